"""`sfumato train lora`, `dreambooth`, `textual-inversion`, `hypernetwork`, `controlnet`: flags -> a trainer, and run.

Everything that a person can mend is checked before anything long begins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sfumato.cli import names
from sfumato.cli.loading import load
from sfumato.cli.training.runs import (
    add_loss_flags,
    add_run_flags,
    add_watch_flags,
    config_of,
    device_of,
    done,
    shown_of,
    watched_of,
)

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    import torch

    from sfumato.families import Model
    from sfumato.images.annotate import Network
    from sfumato.train.data import Pictures
    from sfumato.train.personal import Prior, Ready, Setup
    from sfumato.train.views import Annotate, Hints

CLASS_COUNT = 100


def _add_common(parser: argparse.ArgumentParser, lr: float, ema: float, caption_drop: float, batch: int = 1) -> None:
    add_run_flags(parser, lr, ema, batch, ranks=False)
    add_loss_flags(parser, caption_drop)
    add_watch_flags(parser, None)
    parser.add_argument(
        "--name", dest="result", metavar="NAME", help="of the result's file (default: the run's folder's)"
    )


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caption", "--instance-prompt", metavar="TEXT",
        help="the caption of all pictures, as 'a photo of sks dog' (default: the .txt beside each)")  # fmt: skip


def _add_checkpointing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")


def _add_save_dtype(parser: argparse.ArgumentParser, usual: str) -> None:
    parser.add_argument("--save-dtype", choices=names.PRECISIONS, default=usual, help="precision of the result's file; "
        "training keeps its own (default: %(default)s)")  # fmt: skip


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kind", choices=names.ADAPTERS, default="lora", help="(default: %(default)s)")
    add("--rank", type=int, default=16, metavar="N", help="(default: %(default)s)")
    add("--alpha", type=float, metavar="X", help="the change counts alpha / rank (default: the rank)")
    add("--target", action="append", metavar="NAME",
        help=f"what is changed: {', '.join(names.TARGETS)}, or the end of layers' names; may be given again (default: "
        "attention)")  # fmt: skip
    add("--dropout", type=float, default=0.0, metavar="X", help="of inputs, of lora and locon (default: %(default)s)")
    add("--tucker", action="store_true", help="large kernels with a core (locon, loha, lokr)")
    add("--factor", type=int, metavar="N", help="lokr's smaller factor (default: near the root)")


def _add_prior(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--class-prompt", metavar="TEXT", help="what the subject is one of, as 'a photo of a dog': keep what the model "
        "knows of it")  # fmt: skip
    add("--class-data", metavar="DIR", help="pictures of it (default: the model draws them first)")
    add("--class-count", type=int, metavar="N", help=f"of its pictures; missing ones are drawn (default: those of "
        f"--class-data, else {CLASS_COUNT})")  # fmt: skip
    add("--class-steps", type=int, metavar="N", help="steps of their drawing (default: the model's own)")
    add("--prior-weight", type=float, default=1.0, metavar="X", help="what they count (default: %(default)s)")


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """Of LoRA and its kin; with --class-prompt, DreamBooth into an adapter."""
    _add_common(parser, 1e-4, 0.99, 0.0)
    _add_caption(parser)
    _add_adapter(parser)
    parser.add_argument("--train-text", action="store_true", help="change the text encoders too (rate: --text-lr)")
    _add_prior(parser)
    _add_save_dtype(parser, "fp16")
    _add_checkpointing(parser)


def add_dreambooth_flags(parser: argparse.ArgumentParser) -> None:
    """Of the whole U-Net."""
    _add_common(parser, 5e-6, 0.99, 0.0)
    _add_caption(parser)
    parser.add_argument("--train-text", action="store_true", help="train the text encoders as well")
    _add_prior(parser)
    _add_checkpointing(parser)


def add_inversion_flags(parser: argparse.ArgumentParser) -> None:
    """Of a word."""
    _add_common(parser, 5e-3, 0.99, 0.0)
    add = parser.add_argument
    add("--initial", default="thing", metavar="WORDS", help="what it begins as (default: %(default)s)")
    add("--vectors", type=int, default=0, metavar="N", help="tokens that it takes (default: those of --initial)")
    add("--templates", choices=names.TEMPLATES, default="subject", help="its prompts (default: %(default)s)")
    add("--caption-prob", type=float, default=0.0, metavar="X", help="share of prompts that end with the caption")
    _add_checkpointing(parser)


def add_hypernetwork_flags(parser: argparse.ArgumentParser) -> None:
    """Of a hypernetwork."""
    _add_common(parser, 1e-5, 0.99, 0.1)
    _add_caption(parser)
    add = parser.add_argument
    add("--layers", type=float, nargs="+", default=[1, 2, 1], metavar="X", help="widths (default: 1 2 1)")
    add("--activation", choices=names.ACTIVATIONS, default="linear", help="(default: %(default)s)")
    add("--weight-init", choices=names.WEIGHT_INITS, default="Normal", help="(default: %(default)s)")
    add("--layer-norm", action="store_true", help="normalise behind each layer")


def add_controlnet_flags(parser: argparse.ArgumentParser) -> None:
    """Of a ControlNet."""
    _add_common(parser, 1e-5, 0.999, names.HINT_CAPTION_DROP, batch=4)
    _add_caption(parser)
    add = parser.add_argument
    add("--annotate", choices=names.ANNOTATORS, help="make the hints of the pictures themselves")
    add("--hints", metavar="DIR", help="or read them from this folder, of the same names")
    add("--hint-drop", type=float, default=0.0, metavar="X", help="share of black hints (default: %(default)s)")
    _add_save_dtype(parser, "fp16")
    _add_checkpointing(parser)


# -- flags -> a trainer -----------------------------------------------------------------------------------------------


def run_lora(args: argparse.Namespace) -> int:
    """`sfumato train lora`."""
    from sfumato.train import personal
    from sfumato.train.lora import LoRAConfig

    targets = tuple(args.target or ["attention"])
    config = LoRAConfig(
        args.kind, args.rank, args.alpha, targets, args.dropout, args.tucker, args.factor, args.train_text
    )
    prior = _prior(args)
    setup = _setup(args)
    dtype = _save_dtype(args)
    return _run(lambda: personal.lora(setup, config, prior, args.gradient_checkpointing, dtype), setup, args)


def run_dreambooth(args: argparse.Namespace) -> int:
    """`sfumato train dreambooth`."""
    from sfumato.train import personal

    prior = _prior(args)
    setup = _setup(args)
    return _run(lambda: personal.dreambooth(setup, args.train_text, prior), setup, args)


def run_inversion(args: argparse.Namespace) -> int:
    """`sfumato train textual-inversion`."""
    from sfumato.train import personal
    from sfumato.train.inversion import TEMPLATES, InversionConfig

    name = args.result or args.out.absolute().name
    config = InversionConfig(name, args.initial, args.vectors, TEMPLATES[args.templates], args.caption_prob)
    setup = _setup(args, need_captions=False)
    return _run(lambda: personal.textual_inversion(setup, config), setup, args)


def run_hypernetwork(args: argparse.Namespace) -> int:
    """`sfumato train hypernetwork`."""
    from sfumato.models.hypernetwork import HypernetworkConfig
    from sfumato.train import personal
    from sfumato.train.hypernetwork import context_widths

    shape = {
        "layers": tuple(int(each) if each == int(each) else each for each in args.layers),
        "activation": args.activation, "layer_norm": args.layer_norm, "weight_init": args.weight_init,
    }  # fmt: skip
    HypernetworkConfig(**shape)
    setup = _setup(args)
    config = HypernetworkConfig(tuple(sorted(context_widths(setup.model))), **shape)
    return _run(lambda: personal.hypernetwork(setup, config), setup, args)


def run_controlnet(args: argparse.Namespace) -> int:
    """`sfumato train controlnet`."""
    from sfumato.train import personal
    from sfumato.train.views import Hints

    if (args.hints is None) == (args.annotate is None):
        raise ValueError("hints: one of --annotate NAME and --hints DIR is needed")
    setup = _setup(args)
    if args.hints is not None:
        hints: Annotate | Hints = Hints(args.hints, setup.pictures)
        told = "folder"
    else:
        hints, told = _annotator(args.annotate, setup.model), args.annotate
    dtype = _save_dtype(args)
    return _run(lambda: personal.controlnet(setup, hints, told, args.hint_drop, dtype), setup, args)


def _setup(args: argparse.Namespace, need_captions: bool = True) -> Setup:
    """What every trainer is given; everything that can be wrong with the flags and the pictures is told here."""
    from sfumato.train.conditions import check_trainable
    from sfumato.train.data import open_pictures
    from sfumato.train.diffusion import DiffusionConfig
    from sfumato.train.personal import Setup
    from sfumato.train.views import Captioned, check_captions

    options = DiffusionConfig(args.caption_drop, args.min_snr, offset_noise=args.offset_noise)
    config = config_of(args)
    pictures: Pictures = open_pictures(*args.data, need_captions=False)
    if getattr(args, "caption", None) is not None:
        pictures = Captioned(pictures, args.caption)
    elif need_captions:
        check_captions(pictures)
    model = load(args, device_of(args), "full").model
    check_trainable(model)
    name = args.result or args.out.absolute().name
    return Setup(model, pictures, shown_of(args, model), config, options, args.out, name, watched_of(args))


def _run(make: Callable[[], Ready], setup: Setup, args: argparse.Namespace) -> int:
    """Make a trainer ready and run it, on all ranks that torchrun started."""
    from sfumato.train import personal
    from sfumato.train.distributed import joined

    with joined(setup.model.device):
        path = personal.run(make(), setup, getattr(args, "gradient_checkpointing", False))
    return done(path, setup.pictures)


def _save_dtype(args: argparse.Namespace) -> torch.dtype:
    """The precision that --save-dtype names."""
    from sfumato.pipeline import PRECISIONS

    return PRECISIONS[args.save_dtype]


def _prior(args: argparse.Namespace) -> Prior | None:
    """The class of the subject that the flags name; None where they name none."""
    from sfumato.train.data import open_pictures
    from sfumato.train.dreambooth import PriorConfig
    from sfumato.train.personal import Prior

    if args.class_prompt is None:
        for name in ("class_data", "class_count", "class_steps"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)!r}: it belongs to a --class-prompt, there is none")
        return None
    if args.class_count is not None:
        PriorConfig(args.class_prompt, args.class_count, args.prior_weight)
    pictures = None if args.class_data is None else open_pictures(args.class_data, need_captions=False)
    count = args.class_count
    if count is None:
        count = CLASS_COUNT if pictures is None else len(pictures)
    return Prior(PriorConfig(args.class_prompt, count, args.prior_weight), pictures, args.class_steps)


def _annotator(name: str, model: Model) -> Annotate:
    """What makes a hint; ValueError where it needs a network that is not to be had here."""
    from sfumato.images.annotate import annotate, find_annotator
    from sfumato.weights.controls.hed import load_hed, soft_edges

    kind = find_annotator(name).network
    network: Network | None = None
    if kind == "edges":
        network = partial(soft_edges, load_hed(device=model.device))
    elif kind is not None:
        raise ValueError(f"annotate={name!r}: make the hints with `sfumato annotate` first and give their folder")
    return lambda pixels: annotate(pixels, name, network)
