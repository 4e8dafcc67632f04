"""StableDiffusionPipeline as diffusers has it, on our engine: loading, moving, calling, and what comes back.

Translates only: arguments to Jobs, a generator to the noise of runs, final latents to what was asked for.
Letters: B pictures, prompt by prompt; C channels, h w latent size; x = x0 + sigma noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.diffusers_style.arguments import LOADING_IGNORED, in_their_names, refuse, refuse_unknown, sized, texts_of
from sfumato.diffusers_style.looking import OWN, check_checker, looked_at, own_checker
from sfumato.diffusers_style.noise import BatchNoise, Generators, Share
from sfumato.diffusers_style.output import OUTPUT_TYPES, PipelineOutput, pictures_as
from sfumato.diffusion.samplers import find_sampler
from sfumato.engine import Run
from sfumato.memory import Offload, offload
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.layers import slice_attention
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.pipeline import PRECISIONS, Pipeline, box_path, choose_device
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete
from sfumato.tasks.decoding import decode
from sfumato.tasks.diffusers_scheduler import CHANGEABLE, Scheduler, scheduler_of, usual_scheduler
from sfumato.tasks.scenes import sigmas_of
from sfumato.types import Job
from sfumato.weights.hub import resolve
from sfumato.weights.layouts.folder import read_configs

Callback = Callable[..., Mapping[str, Any] | None]


class StableDiffusionPipeline:
    """A loaded model that is called as diffusers' pipeline of this name is; `pipeline` is ours behind it.

    The same generator gives the same starting noise, and PNDM, DDIM, Euler, Heun and LMS visit the same levels, so the
    pictures are those of diffusers. Pictures are looked at where the folder has a `safety_checker` or one is given,
    also later, as `pipe.safety_checker = ...`; flagged ones come back black. One call at a time.
    """

    _SIZES: ClassVar[tuple[str, ...]] = ()
    _CHECKED: ClassVar[bool] = True  # whether folders of it may have a checker of their own

    def __init__(
        self, pipeline: Pipeline, scheduler: object = None, config: Mapping[str, Any] | None = None,
        safety_checker: Any = None,
    ) -> None:  # fmt: skip
        self.pipeline = pipeline
        self.safety_checker = safety_checker
        self._config = dict(config or {})
        family = pipeline.model.family
        self._scheduler = (
            usual_scheduler(family, self._config)
            if scheduler is None
            else scheduler_of(scheduler, family, self._config)
        )
        self._interrupt = False
        self._bar: dict[str, Any] = {"disable": None}
        self._decoding: dict[str, int] = {}
        self._offload: Offload | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        use_auth_token: str | bool | None = None,
        vae: str | Path | None = None,
        scheduler: object = None,
        safety_checker: Any = OWN,
        **more: Any,
    ) -> StableDiffusionPipeline:
        """Load a file, a folder, a model of the hub, or the model in the box where no name is given, on the CPU.

        `torch_dtype` None is float32; `vae` is a file, folder or hub name; `scheduler` as in `scheduler_of`. As in
        diffusers, a folder's own `safety_checker` is loaded, None turns it off; XL has none, nor has a single file.
        """
        refuse_unknown((name for name in more if name not in LOADING_IGNORED), cls.from_pretrained)
        if safety_checker is not OWN:
            check_checker(safety_checker)
        names = {dtype: name for name, dtype in PRECISIONS.items()}
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        if dtype not in names:
            raise ValueError(f"torch_dtype={dtype}: one of {', '.join(map(str, names))}")
        name = pretrained_model_name_or_path
        path = box_path() if name is None else resolve(name, revision, variant, use_auth_token or token)
        pipeline = Pipeline.from_pretrained(path, "cpu", names[dtype], vae=vae, variant=variant)
        configs = read_configs(path) if path.is_dir() else {}
        if safety_checker is OWN:
            safety_checker = own_checker(path, configs.get("model_index.json", {})) if cls._CHECKED else None
        return cls(pipeline, scheduler, configs.get("scheduler/scheduler_config.json"), safety_checker)

    from_single_file = from_pretrained

    def to(self, *places: object, device: object = None, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
        """Move to a device, a dtype or both, in any order, as torch's modules do; returns the pipeline itself."""
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        self._bring_home()
        self.pipeline.to(None if device is None else str(device), dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.model.dtype

    @property
    def unet(self) -> UNet:
        return self.pipeline.model.unet

    @property
    def vae(self) -> Autoencoder:
        return self.pipeline.model.autoencoder

    @property
    def text_encoder(self) -> CLIPText:
        return self.pipeline.model.texts[0]

    @property
    def tokenizer(self) -> ClipTokenizer:
        return self.pipeline.model.tokenizers[0]

    @property
    def scheduler(self) -> Scheduler:
        """The sampler in use; set it to a name or to a scheduler of diffusers."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, wanted: object) -> None:
        self._scheduler = scheduler_of(wanted, self.pipeline.model.family, self._config)

    @property
    def safety_checker(self) -> Any:
        """What looks at pictures; None: nothing does."""
        return self._checker

    @safety_checker.setter
    def safety_checker(self, checker: Any) -> None:
        self._checker = check_checker(checker)

    @property
    def interrupt(self) -> bool:
        """Whether the drawing stops after this step; a callback sets `_interrupt`."""
        return self._interrupt

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Bound the memory of attention to 1024 query rows at a time; "max", or a number of heads, to 256."""
        rows = None if slice_size is None else 1024 if slice_size == "auto" else 256
        for network in (self.unet, self.vae):
            slice_attention(network, rows)

    def disable_attention_slicing(self) -> None:
        self.enable_attention_slicing(None)

    def enable_vae_slicing(self) -> None:
        """Decode one picture at a time instead of four."""
        self._decoding["max_pictures"] = 1

    def disable_vae_slicing(self) -> None:
        self._decoding.pop("max_pictures", None)

    def enable_vae_tiling(self, tile: int = 512) -> None:
        """Decode larger pictures in tiles of so many pixels; seams are blended, so pixels differ a little."""
        self._decoding["tile"] = tile

    def disable_vae_tiling(self) -> None:
        self._decoding.pop("tile", None)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device = "cuda") -> None:
        """Compute on the device, with only the network in use on it and the others on the CPU; `to` ends it."""
        there = choose_device(str(device) if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")
        self.to("cpu")
        self._offload = offload(self.pipeline.model.networks, there)
        self.pipeline = Pipeline(replace(self.pipeline.model, device=there), self.pipeline.engine.max_rows)

    def _bring_home(self) -> None:
        if self._offload is not None:
            self._offload.remove()
            self._offload = None
            home = replace(self.pipeline.model, device=torch.device("cpu"))
            self.pipeline = Pipeline(home, self.pipeline.engine.max_rows)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as disable=True. Unless told otherwise the bar is on a terminal only."""
        self._bar = options

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        clip_skip: int | None = None,
        guidance_rescale: float = 0.0,
        **more: Any,
    ) -> PipelineOutput | tuple[Any, list[bool] | None]:
        """Draw `num_images_per_prompt` pictures of each prompt: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W)
        in [0, 1], or latents (B, C, h, w).

        A `guidance_scale` up to 1 is none; `eta` is DDIM's alone. `latents` (B, C, h, w) ~ N(0, 1) are the starting
        noise, else the generator gives it, or torch's own. `clip_skip` more text layers are left out than always,
        of the negative prompt too (diffusers leaves that whole).
        `callback_on_step_end(pipeline, i, timestep, {"latents": ...})` is told the latents after each network call, in
        the scale of `Scheduler.scale`: variance-preserving for PNDM, DDIM and the DPM solvers, x = x0 + sigma noise for
        Euler, Heun and LMS. It may set `pipeline._interrupt = True`, or return {"latents": changed} where the sampler
        allows it (`CHANGEABLE`).
        """
        sizes = {name: more.pop(name) for name in self._SIZES if name in more}
        refuse(more, StableDiffusionPipeline.__call__, self._SIZES)
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            given = tuple(callback_on_step_end_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs={given}: only 'latents' is there yet")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: one of {', '.join(OUTPUT_TYPES)}")
        prompts = texts_of("prompt", prompt)
        negatives = texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt, len(prompts))
        if callback_on_step_end is not None and self.scheduler.alone:
            raise ValueError(f"callback_on_step_end: with {self.scheduler.sampler} each picture takes its own steps")
        fields = {
            "height": height,
            "width": width,
            "steps": num_inference_steps,
            "guidance": guidance_scale,
            "count": num_images_per_prompt,
            "eta": eta,
            "clip_skip": clip_skip,
            "rescale": guidance_rescale,
        }
        texts = zip(prompts, negatives, strict=True)
        jobs = [self._job({"prompt": text, "negative": other, **fields}, sizes) for text, other in texts]
        final = self._drive(self._runs(jobs, generator, latents), jobs[0], callback_on_step_end)
        if output_type == "latent":
            return PipelineOutput(final.clone()) if return_dict else (final.clone(), None)
        images, flags = self._pictures(final, output_type)
        return PipelineOutput(images, flags) if return_dict else (images, flags)

    def _job(self, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> Job:
        """A complete Job of the scheduler's sampler; errors name its fields as they are called here."""
        sampler, guidance, skip = self.scheduler.sampler, fields["guidance"], fields["clip_skip"]
        fields = {**fields, "like": "diffusers", "sampler": sampler, "schedule": self.scheduler.schedule}
        if isinstance(guidance, (int, float)) and guidance <= 1:
            fields["guidance"] = 1.0
        if sampler != "ddim":
            fields["eta"] = None
        if isinstance(skip, int):  # ours counts all layers, and 1 is none
            tower = self.pipeline.model.family.texts[0]
            fields["clip_skip"] = skip + tower.skip_last + tower.not_stored + 1
        try:
            family = self.pipeline.model.family
            job = complete(Job(**fields), family)
            return complete(sized(job, sizes), family) if sizes else job
        except ValueError as error:
            raise ValueError(in_their_names(str(error))) from error

    def _levels(self, job: Job) -> list[float]:
        """The noise levels that a complete job visits: diffusers', or those of a schedule of ours."""
        theirs = self.scheduler.levels(self.pipeline.engine.denoiser.schedule, int(job.steps or 1))
        return theirs or sigmas_of(job, self.pipeline.model)

    def _runs(self, jobs: Sequence[Job], generator: Generators, latents: Tensor | None) -> list[Run]:
        """A run for each prompt, all of them on one call's noise."""
        model, sigmas, count = self.pipeline.model, self._levels(jobs[0]), jobs[0].count
        autoencoder, sampler = model.family.autoencoder, find_sampler(str(jobs[0].sampler))
        height, width = (int(side or 0) // autoencoder.factor for side in (jobs[0].height, jobs[0].width))
        noise = BatchNoise(
            (len(jobs) * count, autoencoder.latent_channels, height, width),
            generator,
            model.device,
            model.dtype,
            latents,
            self.scheduler.start_scale(sigmas[0]),
        )
        runs, scale = [], sampler.start_scale(sigmas[0])  # the noise holds the rest of diffusers' scale
        for index, job in enumerate(jobs):
            share = Share(noise, slice(index * count, (index + 1) * count))
            runs.append(txt2img.start(job, model, noise=share, sigmas=sigmas, scale=scale))
        return runs

    @torch.inference_mode()
    def _drive(self, runs: Sequence[Run], job: Job, callback: Callback | None) -> Tensor:
        """The runs' latents (B, C, h, w) in diffusers' scale, at the end or where the callback interrupted."""
        self._interrupt = False
        sigmas, level, step = self._levels(job), 0.0, 0
        for run in runs:
            run.advance(None)
        with tqdm(total=len(sigmas) - 1, **self._bar) as bar:
            while not self._interrupt and (asked := [run.query for run in runs if run.query is not None]):
                self._step(runs)
                left = [run.query.sigma for run in runs if run.query is not None]
                level = max(left, default=sigmas[-1])
                bar.update(min(len(sigmas) - 1, sum(sigma > level for sigma in sigmas)) - bar.n)
                if callback is not None:
                    self._tell(callback, runs, step, asked[0].sigma, level)
                step += 1
        latents = torch.cat([_x_of(run) for run in runs]) * self.scheduler.scale(level)
        for run in runs:
            run.cancel()
        return latents

    def _step(self, runs: Sequence[Run]) -> None:
        """Answer the pending query of every run; raises the error of one that failed."""
        pending = [run.query for run in runs]
        while any(run.query is not None and run.query is query for run, query in zip(runs, pending, strict=True)):
            self.pipeline.engine.turn(runs)
        for run in runs:
            if run.error is not None:
                raise run.error

    def _tell(self, callback: Callback, runs: Sequence[Run], step: int, sigma: float, level: float) -> None:
        """Call back after a network call at `sigma` that led to `level`, and take what it changed."""
        parts, scale = [_x_of(run) for run in runs], self.scheduler.scale(level)
        latents = torch.cat(parts) * scale
        timestep = torch.tensor(self.scheduler.timestep(sigma, self.pipeline.engine.denoiser.schedule))
        with torch.inference_mode(False), torch.no_grad():
            given = latents.clone()
            returned = callback(self, step, timestep, {"latents": given}) or {}
        changed = returned.get("latents", given)
        if torch.equal(changed, latents):
            return
        if self.scheduler.sampler not in CHANGEABLE:
            raise ValueError(
                f"callback_on_step_end: it changed the latents, which only {', '.join(sorted(CHANGEABLE))} allow"
            )
        for part, rows in zip(parts, (changed / scale).split([len(part) for part in parts]), strict=True):
            part.copy_(rows)  # the tensor that the sampler goes on from

    def _pictures(self, latents: Tensor, kind: str) -> tuple[Any, list[bool] | None]:
        """The pictures as asked for, and which of them are flagged."""
        images, flags = decode(latents, 0.0, self.pipeline.model, **self._decoding), None
        if self._checker is not None:
            images, flags = looked_at(self._checker, images)
        return pictures_as(images, kind), flags


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """The same with the defaults of XL, and its sizes (height, width) and crop (top, left) in pixels as arguments."""

    _CHECKED = False
    _SIZES = ("original_size", "crops_coords_top_left", "target_size")

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        *arguments: Any,
        **more: Any,
    ) -> PipelineOutput | tuple[Any, list[bool] | None]:
        """As StableDiffusionPipeline, and `original_size`, `crops_coords_top_left`, `target_size` (the picture's)."""
        return super().__call__(prompt, height, width, num_inference_steps, guidance_scale, *arguments, **more)


def _x_of(run: Run) -> Tensor:
    """The x that a run stands at: of its pending query, or its result; raises the error of one that failed."""
    if run.error is not None:
        raise run.error
    x = run.result if run.query is None else run.query.x
    assert x is not None, "a run that was begun and not cancelled has one of the two"
    return x
