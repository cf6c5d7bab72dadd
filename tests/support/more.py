"""What `make test` leaves to `make test-all`, so that CI is done in time: cases that are mostly seen elsewhere.

Each line is the beginning of a test's name, within tests/, and what of it runs in `make test`. A promise
(docs/promises.md) keeps a case there: `tests/test_more.py`.
"""

from __future__ import annotations

BEST = "families/test_best.py::test_the_default_recipe_is_saved_and_runs_in_int8"
EXACT = "families/test_exactness.py::test_without_rounding_flips_the_engine_is_the_simulation"

MORE = {
    **{
        f"{BEST}[{family}]": "sd, controlnet, sdxl, ltx and others: of video U-Nets and other inputs PTQ4DM alone"
        for family in ("img2img", "inpaint", "video_unet", "svd")
    },
    **{
        f"{EXACT}[{family}]": "sd, sdxl and svd; the others' differences are bounded in test_every_family"
        for family in ("inpaint", "controlnet", "video_unet")
    },
    "families/test_onnx.py::test_it_is_the_simulation_in_integers[chroma]": "pixart, and test_onnx_rows",
    "calibration/test_balance.py::test_with_groups": "test_with_gptq_on_top, and checkpoint/test_save_load's groups",
    "calibration/test_sub_pixel.py::test_image_sizes_that_do_not_halve[5]": "sizes 7 and 8",
    "cli/test_bench.py::test_what_best_reaches_is_measured_for_another_recipe": (
        "the rule's arithmetic, in evaluation/peers/test_fidelity"
    ),
    "cli/test_evaluate.py::test_two_processes_print_once_and_make_the_same_images": (
        "two processes in evaluation/test_shards, without what they print"
    ),
    "cli/test_sensitivity.py::test_the_default_recipe_is_chosen_for_and_quantized_by_as_it_was_measured": (
        "test_the_bits_that_it_chooses_are_those_that_quantize_takes, by ptq4dm"
    ),
    "faults/test_numbers.py::test_image_sizes_that_calibration_did_not_see[4]": "size 12",
    "runtimes/cuda/test_executor.py::test_what_cannot_be_compiled_runs_without[answers otherwise": (
        "what answers as at first"
    ),
    "runtimes/test_composition.py::test_killed_wherever_it_is_it_ends_with_the_same_bits": (
        "faults/test_kills, and calibration/test_second_order's and test_quantize's kills"
    ),
    "runtimes/test_export.py::test_the_page_s_script_visits_a_trajectory_and_ends_as_the_scheduler_does": (
        "the page's scripts with the scheduler's own timesteps"
    ),
    "runtimes/test_openvino.py::test_fewer_activation_bits_are_cut_off_8_bit_integers[6-False]": "4 and 2 bits",
    "runtimes/test_time_table.py::test_a_sampler_between_whole_timesteps_has_one_graph[float]": "that of weights",
    "runtimes/test_timestep_groups.py::test_onnx_runtime_finds_the_group_too": "OpenVINO",
}
