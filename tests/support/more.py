"""What `make test` leaves to `make test-all`: cases of which it runs others, so that CI is done in time.

Each line is the beginning of a test's name, within tests/, and what runs of it in `make test`. Only what costs seconds
and would fail together with something that stays is here.
"""

from __future__ import annotations

BEST = "families/test_best.py::test_the_default_recipe_is_saved_and_runs_in_int8"
EXACT = "families/test_exactness.py::test_without_rounding_flips_the_engine_is_the_simulation"
CALLS = "families/test_sequential_guidance.py"

MORE = {
    **{
        f"{BEST}[{family}]": "unconditional, sd, dit, sd3 and flux; every family by PTQ4DM in test_every_family"
        for family in ("img2img", "inpaint", "controlnet", "sdxl", "pixart", "ltx", "video_unet", "svd")
    },
    **{
        f"{EXACT}[{family}]": "sd and sdxl; every family's difference is bounded in test_every_family"
        for family in ("inpaint", "controlnet", "video_unet", "svd")
    },
    **{
        f"{CALLS}::{test}[{family}]": "flux, chroma and lumina2"
        for family in ("qwen_image", "wan")
        for test in (
            "test_both_calls_of_every_drawn_step_are_caught",
            "test_every_layer_runs_in_int8_in_the_graphs_of_both_calls",
            "test_whole_timesteps_are_read_from_a_table",
        )
    },
    "families/test_onnx.py::test_it_is_the_simulation_in_integers[chroma]": "pixart, and test_onnx_rows",
    "calibration/test_balance.py::test_with_groups": "test_with_gptq_on_top, and checkpoint/test_save_load's groups",
    "calibration/test_second_order.py::test_a_killed_run_goes_on_to_the_same_bits": "calibration/test_quantize's",
    "calibration/test_sub_pixel.py::test_image_sizes_that_do_not_halve[5]": "sizes 7 and 8",
    "cli/test_bench.py::test_a_large_network_is_balanced_as_best_is_and_rounded_to_nearest": "the rule's own cases",
    "cli/test_bench.py::test_what_best_reaches_is_measured_for_another_recipe": "figures beside their PSNR",
    "cli/test_evaluate.py::test_two_processes_print_once_and_make_the_same_images": "two in evaluation/test_shards",
    "cli/test_export.py::test_a_portable_file_that_is_part_float_names_the_dialect_that_is_not": "runtimes/test_export",
    "cli/test_sensitivity.py::test_the_default_recipe_is_chosen_for_and_quantized_by_as_it_was_measured": (
        "test_the_bits_that_it_chooses_are_those_that_quantize_takes"
    ),
    "faults/test_disk.py::test_images_on_a_disk_that_is_really_full[arguments2]": "sample's and evaluate's",
    "faults/test_numbers.py::test_image_sizes_that_calibration_did_not_see[4]": "size 12",
    "runtimes/cuda/test_executor.py::test_what_cannot_be_compiled_runs_without[leaves out": "what raises",
    "runtimes/cuda/test_executor.py::test_what_cannot_be_compiled_runs_without[answers": "what raises",
    "runtimes/test_composition.py::test_killed_wherever_it_is_it_ends_with_the_same_bits": (
        "faults/test_kills, calibration/test_quantize and test_kept_results"
    ),
    "runtimes/test_export.py::test_the_page_s_script_visits_a_trajectory_and_ends_as_the_scheduler_does": (
        "the page's scripts with the scheduler's own timesteps"
    ),
    "runtimes/test_openvino.py::test_fewer_activation_bits_are_cut_off_8_bit_integers[6-False]": "4 and 2 bits",
    "runtimes/test_time_table.py::test_a_sampler_between_whole_timesteps_has_one_graph[float]": "that of weights",
    "runtimes/test_timestep_groups.py::test_onnx_runtime_finds_the_group_too": "OpenVINO, and test_onnx_convert",
    "study/test_engine.py::test_hundreds_of_conversions_do_not_fill_the_memory": "what lets go of each, one by one",
}
