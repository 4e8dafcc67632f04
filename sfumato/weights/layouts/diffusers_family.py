"""The Family of a diffusers folder, from its JSON configs: published ones, and what diffusers writes with all defaults.

What our networks cannot do is an error that names file and field; a missing field means what it means in diffusers. A
folder does not tell a family's name and defaults: a known family's are given where all else is its, else the nearest
one's name with "-like". Knows no file and no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families import FAMILIES
from sfumato.families.family import SIZE_NUMBERS, Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.tokenizer import FULL_VOCAB_SIZE
from sfumato.models.unet import UNetConfig
from sfumato.weights.layouts import diffusers_fields as words
from sfumato.weights.layouts.diffusers_fields import Configs, Fields
from sfumato.weights.layouts.diffusers_tokenizer import pad_token_of

TEXT_FOLDERS = ("text_encoder", "text_encoder_2")
SMALLEST_VOCAB = 514  # the bytes, alone and at a word's end, and the two special tokens


def is_xl(family: Family) -> bool:
    """Whether the U-Net is told a pooled vector and sizes, as in XL: then the penultimate text layer is read."""
    return family.unet.vector_dim is not None


def text_components(configs: Configs) -> list[str]:
    """The folders of the text encoders that a folder has."""
    index = configs.get(words.INDEX, {})
    names = [name for name in TEXT_FOLDERS if f"{name}/config.json" in configs]
    return [name for name in names if name not in index or index[name] not in (None, [None, None])]


def family_of(configs: Configs, known: Iterable[Family] | None = None) -> Family:
    """The family that a folder's configs describe, named as the one of `known` (all families) that it is.

    `configs` maps paths in the folder to their JSON; the tokenizers' special_tokens_map.json and tokenizer_config.json
    belong to it. ValueError where a file is missing or says what our networks cannot do.
    """
    pipeline, zeros = _index(configs)
    unet, size_dim, sample_size = _unet(Fields(configs, words.UNET))
    autoencoder, latent_scale = _autoencoder(Fields(configs, words.VAE), pipeline)
    xl = unet.vector_dim is not None
    _check_named(configs)
    texts = tuple(_tower(configs, name, xl, place) for place, name in enumerate(text_components(configs)))
    if not texts:
        raise ValueError("text_encoder/config.json is missing")
    _check_both(configs, unet, texts)
    schedule, prediction = _schedule(Fields(configs, words.SCHEDULER))
    if words.LOW_RES in configs:
        _check_low_res(Fields(configs, words.LOW_RES), schedule)
    try:
        family = Family(
            name="unnamed",
            texts=texts,
            unet=unet,
            autoencoder=autoencoder,
            schedule=schedule,
            prediction=prediction,
            size=(sample_size or (128 if xl else 64)) * autoencoder.factor,
            latent_scale=latent_scale,
            size_cond=_size_cond(unet, texts, size_dim),
            size_dim=size_dim,
            concat=_concat(unet.in_channels, autoencoder.latent_channels, pipeline),
            zero_empty_negative=xl and zeros,
        )
    except ValueError as error:
        raise ValueError(f"the folder's configs do not fit together: {error}") from error
    return _named(family, list(FAMILIES.values()) if known is None else list(known))


def _check_named(configs: Configs) -> None:
    """ValueError where the index names a text encoder that has no config."""
    for name in TEXT_FOLDERS:
        entry = configs.get(words.INDEX, {}).get(name)
        if entry not in (None, [None, None]) and f"{name}/config.json" not in configs:
            raise ValueError(f"{name}/config.json is missing: {words.INDEX} names this text encoder")


def _check_both(configs: Configs, unet: UNetConfig, texts: tuple[TextTower, ...]) -> None:
    """ValueError where XL's U-Net is told of two text encoders and there is one."""
    width = texts[0].config.width
    if unet.vector_dim is not None and len(texts) == 1 and unet.context_dim != width:
        (there,) = text_components(configs)
        (other,) = set(TEXT_FOLDERS) - {there}
        raise ValueError(
            f"{other}/config.json is missing: the U-Net wants {unet.context_dim} numbers a token, {there} alone gives "
            f"{width}"
        )


def _class(fields: Fields, default: str, allowed: Collection[str]) -> str:
    name = fields.get("_class_name", default)
    if not isinstance(name, str) or name not in allowed:
        raise fields.wrong("_class_name", f"{default}{' or one of its kin' if len(allowed) > 1 else ''} is needed")
    return name


def _index(configs: Configs) -> tuple[str | None, bool]:
    """(the pipeline's class, whether an empty negative prompt is zeros); a folder may have no index."""
    if words.INDEX not in configs:
        return None, True
    fields = Fields(configs, words.INDEX)
    pipelines = {*words.PIPELINES.values(), words.REFINER_PIPELINE} | words.ALSO
    pipeline = _class(fields, "StableDiffusionPipeline", pipelines)
    fields.only("is_cosxl_edit", (False,))  # an EDM model
    zeros = fields.only("force_zeros_for_empty_prompt", (True, False))
    fields.finish(words.INDEX_HARMLESS)
    return pipeline, zeros


def _unet(fields: Fields) -> tuple[UNetConfig, int, int | None]:
    """(the U-Net, width of each sinusoid of XL's sizes, width and height in latent cells)."""
    _class(fields, "UNet2DConditionModel", {"UNet2DConditionModel"})
    fields.all_only(words.UNET_ONLY)
    widths = fields.numbers("block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    mult = _multiples(fields, "block_out_channels", widths)
    attended = _attended(fields, levels)
    layers = fields.each("transformer_layers_per_block", 1, levels)
    cross_only = fields.each("only_cross_attention", False, levels, bool)
    vector_dim, size_dim = _vector(fields)
    unet = UNetConfig(
        in_channels=fields.whole("in_channels", 4),
        out_channels=fields.whole("out_channels", 4),
        channels=widths[0],
        channel_mult=mult,
        num_res_blocks=fields.same("layers_per_block", 2, levels),
        transformer_depth=tuple(depth if there else 0 for depth, there in zip(layers, attended, strict=True)),
        middle_depth=layers[-1],
        context_dim=fields.same("cross_attention_dim", 1280, levels),
        linear_projection=fields.only("use_linear_projection", (False, True)),
        vector_dim=vector_dim,
        norm_groups=fields.whole("norm_num_groups", 32),
        num_classes=fields.optional("num_class_embeds"),
        cross_only=cross_only if any(cross_only) else (),
        **_heads(fields, widths, attended),
    )
    side = None if fields.get("sample_size") is None else fields.same("sample_size", 64, 2)  # height, width
    fields.finish(words.UNET_HARMLESS | words.EMA)
    return unet, size_dim, side


def _vector(fields: Fields) -> tuple[int | None, int]:
    """(width of XL's vector or None, width of each sinusoid in it)."""
    width, dim = "projection_class_embeddings_input_dim", "addition_time_embed_dim"
    if fields.only("addition_embed_type", (None, "text_time")) is not None:
        return fields.whole(width, None), fields.whole(dim, None)
    fields.read |= {width, dim}  # they say nothing then
    return None, Family.size_dim


def _multiples(fields: Fields, name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    if any(width % widths[0] for width in widths):
        raise fields.wrong(name, f"multiples of the first, {widths[0]}, are allowed")
    return tuple(width // widths[0] for width in widths)


def _attended(fields: Fields, levels: int) -> list[bool]:
    """Which resolutions have attention; the way up must be the way down's mirror."""
    down = fields.names("down_block_types", (*[words.CROSS[0]] * 3, words.PLAIN[0]))
    up = fields.names("up_block_types", (words.PLAIN[1], *[words.CROSS[1]] * 3))
    for name, types, place in (("down_block_types", down, 0), ("up_block_types", up, 1)):
        allowed = (words.CROSS[place], words.PLAIN[place])
        if len(types) != levels or set(types) - set(allowed):
            raise fields.wrong(name, f"{levels} of {' and '.join(allowed)} are allowed")
    attended = [name == words.CROSS[0] for name in down]
    if attended != [name == words.CROSS[1] for name in reversed(up)]:
        raise fields.wrong("up_block_types", f"the mirror of down_block_types, {list(down)}, is allowed")
    return attended


def _heads(fields: Fields, widths: tuple[int, ...], attended: list[bool]) -> dict[str, int]:
    """UNetConfig's fields of attention heads. "attention_head_dim" is their number, whatever its name says; written
    as a list it is, where that fits, heads of one width."""
    value = fields.get("attention_head_dim", 8)
    numbers = fields.each("attention_head_dim", 8, len(widths))
    used = [(width, n) for width, n, there in zip(widths, numbers, attended, strict=True) if there]
    used.append((widths[-1], numbers[-1]))  # the middle
    if any(width % n for width, n in used):
        raise fields.wrong("attention_head_dim", f"numbers of heads that divide the widths {list(widths)} are needed")
    sizes = {width // n for width, n in used}
    if isinstance(value, (list, tuple)) and len(sizes) == 1:
        return {"head_channels": sizes.pop()}
    if len({n for _, n in used}) == 1:
        return {"num_heads": used[0][1]}
    raise fields.wrong("attention_head_dim", "heads of one number or of one width at all resolutions are allowed")


def _autoencoder(fields: Fields, pipeline: str | None) -> tuple[AutoencoderConfig, float]:
    """(the autoencoder, the scale of its latents)."""
    _class(fields, "AutoencoderKL", {"AutoencoderKL"})
    fields.all_only(words.VAE_ONLY)
    widths = fields.numbers("block_out_channels", (64,))
    levels = len(widths)
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if fields.names(name, (block,)) != (block,) * levels:
            raise fields.wrong(name, f"{levels} times {block!r} is allowed")
    channels = fields.whole("in_channels", 3)
    if fields.whole("out_channels", 3) != channels:
        raise fields.wrong("out_channels", f"{channels}, as many as in_channels, is allowed")
    config = AutoencoderConfig(
        channels=widths[0],
        channel_mult=_multiples(fields, "block_out_channels", widths),
        num_res_blocks=fields.whole("layers_per_block", 1),
        latent_channels=fields.whole("latent_channels", 4),
        image_channels=channels,
        norm_groups=fields.whole("norm_num_groups", 32),
    )
    # The upscaler's first folder had no scale, and its pipeline knows better than the default.
    upscaler = pipeline == words.PIPELINES[False, "lowres"]
    scale = fields.number("scaling_factor", 0.08333 if upscaler else 0.18215)
    fields.finish(words.VAE_HARMLESS)
    return config, scale


def _tower(configs: Configs, component: str, xl: bool, place: int) -> TextTower:
    """A text encoder. Heads and names of OpenCLIP's are told from OpenAI's by their activation."""
    fields = Fields(configs, f"{component}/config.json")
    fields.all_only(words.TEXT_ONLY)
    width, vocab_size = fields.whole("hidden_size", 512), fields.whole("vocab_size", FULL_VOCAB_SIZE)
    if fields.whole("intermediate_size", 2048) != 4 * width:
        raise fields.wrong("intermediate_size", f"4 times hidden_size, {4 * width}, is allowed")
    if not SMALLEST_VOCAB <= vocab_size <= FULL_VOCAB_SIZE:
        raise fields.wrong("vocab_size", f"{SMALLEST_VOCAB} to {FULL_VOCAB_SIZE} is allowed")
    projected = _text_class(configs, component) == words.PROJECTED_TEXT
    end = fields.get("eos_token_id", 2)
    if projected and end not in (2, vocab_size - 1):  # 2: older files, where it means the highest id
        raise fields.wrong("eos_token_id", f"2 or the last token, {vocab_size - 1}, is allowed")
    projection = fields.whole("projection_dim", 512) if projected else None
    quick_gelu = fields.only("hidden_act", ("quick_gelu", "gelu")) == "quick_gelu"
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=fields.whole("num_hidden_layers", 12),
        num_heads=fields.whole("num_attention_heads", 8),
        max_length=fields.whole("max_position_embeddings", 77),
        quick_gelu=quick_gelu,
        projection=projection,
    )
    fields.finish(words.TEXT_HARMLESS | {"projection_dim"})
    folder = component.replace("text_encoder", "tokenizer")
    files = {path.removeprefix(f"{folder}/"): value for path, value in configs.items() if path.startswith(f"{folder}/")}
    return TextTower(
        config,
        prefix=(f"conditioner.embedders.{place}." if xl else "cond_stage_model.")
        + ("transformer." if quick_gelu else "model."),
        openclip=not quick_gelu,
        skip_last=1 if xl else 0,
        final_norm=not xl,
        pad_token=pad_token_of(files, vocab_size) if files else None if quick_gelu else 0,
        not_stored=0 if xl or quick_gelu else 1,  # 2.x: a folder ends at the penultimate layer
    )


def _text_class(configs: Configs, component: str) -> str:
    """The class of a text encoder: what the index says, else its own config."""
    entry = configs.get(words.INDEX, {}).get(component)
    path, found = words.INDEX, entry[-1] if isinstance(entry, list) and entry else None
    if found is None:
        path = f"{component}/config.json"
        names = configs[path].get("architectures") or [words.PLAIN_TEXT]
        found = names[0]
    if found not in (words.PLAIN_TEXT, words.PROJECTED_TEXT):
        raise ValueError(f"{path}: {component} is a {found}: {words.PLAIN_TEXT} or {words.PROJECTED_TEXT} is allowed")
    return found


def _schedule(fields: Fields) -> tuple[ScheduleConfig, str]:
    """(the noise levels that the network was trained at, what it predicts); how a sampler steps is not a family's."""
    _class(fields, "DDIMScheduler", words.SCHEDULERS)
    fields.all_only(words.SCHEDULER_ONLY)
    if fields.get("beta_schedule", "linear") != "scaled_linear":
        raise fields.wrong("beta_schedule", "'scaled_linear' is needed")
    names = {theirs: ours for ours, theirs in words.PREDICTIONS.items()}
    prediction = names[fields.only("prediction_type", tuple(names))]
    schedule = ScheduleConfig(
        beta_start=fields.number("beta_start", 0.0001),
        beta_end=fields.number("beta_end", 0.02),
        num_timesteps=fields.whole("num_train_timesteps", 1000),
        zero_terminal_snr=fields.only("rescale_betas_zero_snr", (False, True)),
    )
    fields.finish(words.SCHEDULER_HARMLESS)
    return schedule, prediction


def _check_low_res(fields: Fields, schedule: ScheduleConfig) -> None:
    """The upscaler's small picture is made noisy at the levels of the picture itself; a family has only those."""
    low = _schedule(fields)[0]
    if low != replace(schedule, zero_terminal_snr=False):
        raise ValueError(f"{words.LOW_RES}: the schedule of {words.SCHEDULER} is needed here too, got {low}")


def _size_cond(unet: UNetConfig, texts: tuple[TextTower, ...], size_dim: int) -> tuple[str, ...]:
    """XL's size conditions, told by how many numbers the U-Net's vector has room for."""
    if unet.vector_dim is None:
        return ()
    room = unet.vector_dim - (texts[-1].config.projection or 0)
    for names in (words.BASE, words.REFINER):
        if room == size_dim * sum(SIZE_NUMBERS[name] for name in names):
            return names
    raise ValueError(
        f"{words.UNET}: projection_class_embeddings_input_dim={unet.vector_dim}: the pooled text and 5 or 6 numbers of "
        f"{size_dim} are needed"
    )


def _concat(in_channels: int, latent: int, pipeline: str | None) -> str | None:
    """What the U-Net sees beside x, told by its channels, and by the pipeline where those fit two."""
    beside = {"inpaint": latent + 1, "depth": 1, "picture": latent, "lowres": 3}
    if in_channels == latent:
        return None
    fitting = [concat for concat, channels in beside.items() if in_channels == latent + channels]
    if not fitting:
        allowed = ", ".join(str(latent + channels) for channels in (0, *beside.values()))
        raise ValueError(f"{words.UNET}: in_channels={in_channels}: with {latent} latent channels one of {allowed}")
    told = [concat for (_, concat), name in words.PIPELINES.items() if name == pipeline and concat in fitting]
    return (told or fitting)[0]


def _named(family: Family, known: list[Family]) -> Family:
    """The family with the name and defaults of the known one that it is, else of the nearest, marked "-like"."""
    for one in known:
        if replace(family, name=one.name, defaults=one.defaults) == one:
            return one

    def key(one: Family) -> tuple[object, ...]:
        return (one.concat, is_xl(one), one.size_cond, one.prediction)

    leaves = _leaves(dataclasses.asdict(family))
    alike = [one for one in known if key(one) == key(family)] or known
    nearest = max(alike, key=lambda one: len(leaves & _leaves(dataclasses.asdict(one))))
    return replace(family, name=f"{nearest.name}-like", defaults=nearest.defaults)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    """All plain values of nested dicts and tuples, with where they stand."""
    if isinstance(value, Mapping):
        return set().union(*(_leaves(item, (*path, name)) for name, item in value.items()))
    if isinstance(value, (tuple, list)):
        return set().union(*(_leaves(item, (*path, place)) for place, item in enumerate(value)))
    return {(*path, value)}
