"""A float pipeline with single layers exchanged for quantized ones: what that does to images and to evaluations"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from octavo.calibration.tracing import NETWORK_OUTPUT, split_output
from octavo.diffusion import find_denoiser, with_denoiser
from octavo.diffusion.pairs import TIMESTEP_NAMES, map_leaves
from octavo.errors import OctavoError
from octavo.evaluation.generate import Images, generate
from octavo.evaluation.similarity import mean_squared_error
from octavo.evaluation.trajectory import TrajectoryStep, trajectory
from octavo.quantization import replace, walk
from octavo.runtimes.network import shared_copy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class OneAtATime:
    """`pipeline` with a network of its own (sharing memory), whose layers may be exchanged and come back.

    Images are those of seeds seed .. seed + num_images - 1, by the pipeline's own sampler with `steps` steps, all of
    them in batches of `batch_size`, so that runs differ by their layers alone. `pipeline` stays as it was.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_images: int,
        steps: int,
        seed: int,
        batch_size: int,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        component, denoiser = find_denoiser(pipeline)
        self.network = shared_copy(denoiser).eval()
        self.pipeline = with_denoiser(pipeline, component, self.network)
        self.num_images, self.steps, self.seed = num_images, steps, seed
        self.batch_size, self.inputs = min(batch_size, num_images), inputs
        self._originals: dict[str, nn.Module] = dict(walk(self.network))

    def end_effect(self, layers: Mapping[str, nn.Module], seed: int | None = None) -> NDArray[np.float64]:
        """The mean squared error of each final image in [0, 1] against the float one of its seed: float64 [N].

        `layers`: the quantized ones, by name; the others stay in float. `seed`: of other images than the usual ones.
        """
        reference = self.reference if seed is None else self._images(seed)
        with self.exchanged(layers):
            images = self._images(self.seed if seed is None else seed)
        return mean_squared_error(images, reference)

    def single_errors(self, layers: Mapping[str, nn.Module]) -> NDArray[np.float64]:
        """The mean squared error of one evaluation at each step: float64 [T], from the noisy end.

            e[t] = mean over images and elements of (prediction with `layers` - float prediction)^2

        Both read what the float network is handed along its own trajectory, so no error is carried from step to step.
        A learned variance is left out.
        """
        steps, reference = self.trajectory, self._float_predictions  # made before anything is exchanged
        errors = np.zeros(len(steps))
        with self.exchanged(layers):
            for i, step in enumerate(steps):
                pairs = zip(self._predictions(step), reference[i], strict=True)
                errors[i] = np.mean([float((ours - theirs).square().mean()) for ours, theirs in pairs])
        return errors

    def end_effect_of_step(self, layers: Mapping[str, nn.Module], timestep: float) -> NDArray[np.float64]:
        """As `end_effect`, with `layers` quantized at the evaluations of one of `timesteps` only.

        The network may be told it in another unit than the scheduler's: a thousandth of it, say.
        """
        signature = inspect.signature(type(self.network).forward)
        told = {
            _timestep(call) for step in self.trajectory if step.timestep == timestep for call in step.calls
        }
        if not told:
            raise OctavoError(f"timestep: the sampler never evaluates the network at {timestep}")

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if _timestep(signature.bind(module, *args, **kwargs).arguments) in told:
                self._put(layers)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._put({name: self._originals[name] for name in layers})

        reference = self.reference
        hooks = [
            self.network.register_forward_pre_hook(before, with_kwargs=True),
            self.network.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            images = self._images(self.seed)
        finally:
            for hook in hooks:
                hook.remove()
            self._put({name: self._originals[name] for name in layers})
        return mean_squared_error(images, reference)

    def floor(self) -> NDArray[np.float64]:
        """Float against float, in batches of another size: what the rounding of kernels alone does, float64 [N]."""
        other = max(1, self.batch_size // 2) if self.batch_size > 1 else 1
        return mean_squared_error(self._images(self.seed, other), self.reference)

    @contextmanager
    def exchanged(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block these layers are in the network."""
        try:
            self._put(layers)
            yield
        finally:
            self._put({name: self._originals[name] for name in layers})

    @cached_property
    def reference(self) -> Images:
        """The full-precision images, float32 [N, height, width, channels] in [0, 1]."""
        return self._images(self.seed)

    @cached_property
    def trajectory(self) -> list[TrajectoryStep]:
        """What the float network is handed for these images, step by step."""
        return trajectory(
            self.pipeline,
            num_images=self.num_images,
            steps=self.steps,
            seed=self.seed,
            max_steps=self.steps * 4,
            inputs=self.inputs,
        )

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The training timesteps of the trajectory, from the noisy end."""
        return tuple(step.timestep for step in self.trajectory)

    @cached_property
    def _float_predictions(self) -> list[list[torch.Tensor]]:
        return [self._predictions(step) for step in self.trajectory]

    def _predictions(self, step: TrajectoryStep) -> list[torch.Tensor]:
        device = next(self.network.parameters()).device
        found = []
        with torch.inference_mode():
            for call in step.calls:
                moved = map_leaves(call, lambda _, leaf: leaf.to(device) if torch.is_tensor(leaf) else leaf)
                output = self.network(**{**moved, "return_dict": False})[0]
                sample = next(iter(moved.values()))
                found.append(split_output(output, sample.shape[1])[NETWORK_OUTPUT].double().cpu())
        return found

    def _images(self, seed: int, batch_size: int | None = None) -> Images:
        return generate(
            self.pipeline,
            self.num_images,
            steps=self.steps,
            seed=seed,
            batch_size=batch_size or self.batch_size,
            inputs=self.inputs,
            progress=False,
        )

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            replace(self.network, name, layer)


def _timestep(arguments: Mapping[str, Any]) -> float | None:
    for name in TIMESTEP_NAMES:
        if arguments.get(name) is not None:
            return float(torch.as_tensor(arguments[name]).flatten()[0])
    return None
