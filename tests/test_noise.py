"""Noise against published numbers of CUDA devices, k-diffusion's Brownian tree, and its own rules."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.noise import MAX_SEED, NoiseSpec, SeededNoise, slerp
from sfumato.diffusion.philox import PhiloxGenerator, philox_4x32
from tests.peers import load_k_diffusion

SHAPE = (4, 16, 12)
SIGMAS = [14.6146, 7.0, 3.1, 1.0, 0.3, 0.0292, 0.0]

# Philox.


def test_philox_is_that_of_its_authors() -> None:
    """Known answers of Random123 (Salmon et al. 2011), `kat_vectors`, philox4x32 of ten rounds."""
    ones = 0xFFFFFFFF
    for counter, key, words in (
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # digits of pi
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        found = philox_4x32(np.array(counter, dtype=np.uint64)[:, None], key)
        assert [int(word) for word in found[:, 0]] == words


# The first 64 numbers of torch.randn after manual_seed(0) on a CUDA device, to the four places that a public notebook
# prints of them ("fused_add_mul_relu", a tensor of 8 x 8).
ON_CUDA = """
-0.9247 -0.4253 -2.6438 0.1452 -0.1209 -0.5797 -0.6229 -0.3284
-1.0745 -0.3631 -1.6711 2.2655 0.3117 -0.1842 1.2866 1.1820
-0.1271 1.2169 1.4353 1.0605 -0.4941 -1.4244 -0.7244 -1.2973
0.0697 -0.0074 1.8969 0.6878 -0.0779 -0.8373 1.3506 -0.2879
-0.5965 -0.3283 -0.9086 -0.8059 -0.7407 -0.0504 0.5435 1.5150
0.0141 0.4532 1.6349 0.7124 -0.1806 1.0252 -1.4622 -0.7554
-0.1836 0.3824 0.3918 -0.0830 0.8971 -1.1123 0.1116 0.4863
-0.5499 -0.3231 -0.5469 0.9049 0.2837 0.1210 0.4730 -1.0823
"""
# The same seed to eight places, from the documentation of A1111's rng_philox.
A1111_DOCUMENTS = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709]


def test_philox_noise_is_what_a_cuda_device_prints() -> None:
    drawn = PhiloxGenerator(0).randn((64,))
    np.testing.assert_allclose(drawn, np.array(ON_CUDA.split(), dtype=float), atol=5.1e-5)
    np.testing.assert_allclose(drawn[:8], A1111_DOCUMENTS, atol=5e-7)


FIXTURE = json.loads(Path(__file__).with_name("philox_noise.json").read_text())


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: str(case["seed"]))
def test_philox_noise_has_not_changed(case: dict[str, object]) -> None:
    generator = PhiloxGenerator(int(str(case["seed"])))
    drawn = generator.randn((4, 64, 64))
    np.testing.assert_allclose(drawn.ravel()[:8], case["first"], atol=1e-6)
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == case["sha256"]
    assert drawn.dtype == np.float32
    assert abs(drawn.mean() - float(str(case["mean"]))) < 1e-6
    np.testing.assert_allclose(generator.randn((4, 64, 64)).ravel()[:8], case["second"], atol=1e-6)


def test_philox_noise_is_standard_normal() -> None:
    drawn = PhiloxGenerator(7).randn((100_000,))
    assert abs(drawn.mean()) < 5 / math.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / drawn.size)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(drawn.size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**40 + 3])
def test_philox_noise_is_that_of_this_cuda_device(seed: int) -> None:
    theirs, ours = torch.Generator("cuda").manual_seed(seed), SeededNoise([seed], (4, 64, 64), spec=NoiseSpec("philox"))
    for _ in range(3):
        drawn = torch.randn((4, 64, 64), generator=theirs, device="cuda").cpu()
        torch.testing.assert_close(ours()[0], drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_of_the_device_is_drawn_there() -> None:
    drawn = SeededNoise([3], SHAPE, "cuda", NoiseSpec("device"))()
    again = torch.randn(SHAPE, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    assert torch.equal(drawn[0], again)


# Seeds and batches.

SPECS = [
    NoiseSpec(),
    NoiseSpec("device"),
    NoiseSpec("philox"),
    NoiseSpec(ensd=31337),
    NoiseSpec(resize_from=(8, 20)),
    NoiseSpec("philox", resize_from=(18, 6), ensd=5),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_noise_of_a_seed_does_not_depend_on_its_neighbours(spec: NoiseSpec) -> None:
    batch, alone = SeededNoise([4, 5, 6], SHAPE, spec=spec), SeededNoise([5], SHAPE, spec=spec)
    for _ in range(3):
        of_batch, of_alone = batch(), alone()
        assert of_batch.shape == (3, *SHAPE)
        assert of_batch.dtype == torch.float32
        assert torch.equal(of_batch[1], of_alone[0])
        assert not torch.equal(of_batch[0], of_batch[1])
    assert torch.equal(batch.between(3.0, 1.0)[1], alone.between(3.0, 1.0)[0])


def test_the_default_is_the_generator_of_the_cpu() -> None:
    generator, noise = torch.Generator().manual_seed(9), SeededNoise([9], SHAPE)
    for _ in range(3):
        assert torch.equal(noise()[0], torch.randn(SHAPE, generator=generator))


def test_ensd_starts_again_after_the_first_noise() -> None:
    plain, moved, other = (
        SeededNoise([9], SHAPE),
        SeededNoise([9], SHAPE, spec=NoiseSpec(ensd=11)),
        SeededNoise([20], SHAPE),
    )
    assert torch.equal(plain(), moved())
    assert torch.equal(moved(), other())


# Variations.


def test_a_variation_turns_from_one_noise_to_the_other() -> None:
    base, other = SeededNoise([1], SHAPE)(), SeededNoise([50], SHAPE)()

    def varied(strength: float) -> Tensor:
        return SeededNoise([1], SHAPE, spec=NoiseSpec(variation_seed=50, variation_strength=strength))()

    assert torch.equal(varied(0.0), base)
    torch.testing.assert_close(varied(1.0), other, atol=1e-5, rtol=1e-5)
    middle = varied(0.5)
    assert abs(float(middle.std()) - 1) < 0.1  # slerp keeps the length, a plain mean would have 0.7
    torch.testing.assert_close((middle - base).norm(), (middle - other).norm(), rtol=0.05, atol=0)


def test_pictures_of_a_variation_share_the_seed_and_have_variations_of_their_own() -> None:
    spec = NoiseSpec(variation_seed=50, variation_strength=0.3)
    assert spec.seeds(7, 3) == (7, 7, 7)
    assert NoiseSpec().seeds(7, 3) == (7, 8, 9)
    batch = SeededNoise(spec.seeds(7, 3), SHAPE, spec=spec)()
    alone = SeededNoise([7], SHAPE, spec=NoiseSpec(variation_seed=52, variation_strength=0.3))()
    assert torch.equal(batch[2], alone[0])


def test_slerp_of_parallel_noise_is_linear() -> None:
    low = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(low, 3 * low, 0.25), 1.5 * low)
    assert slerp(low, -low, 0.5).isfinite().all()


@pytest.mark.parametrize("size", [(8, 6), (20, 30), (9, 7), (8, 30), (16, 12)])
def test_resized_noise_lies_in_the_middle(size: tuple[int, int]) -> None:
    """Where the two sizes overlap, about their centres, the noise of the old size; elsewhere that of the new."""
    resized = SeededNoise([3], SHAPE, spec=NoiseSpec(resize_from=size))()[0]
    old, new = SeededNoise([3], (4, *size))()[0], SeededNoise([3], SHAPE)()[0]
    kept = resized == new
    height, width = (min(a, b) for a, b in zip(size, SHAPE[1:], strict=True))
    if size == SHAPE[1:]:
        assert kept.all()
        return
    assert int((~kept[0]).sum()) in range(height * width - 2 * (height + width), height * width + 1)
    assert float(resized[0, 8, 6]) == float(old[0, 8 - (16 - size[0]) // 2, 6 - (12 - size[1]) // 2])


# Brownian noise.


def path(noise: SeededNoise, levels: list[float]) -> Tensor:
    """What a path gathers from the first level to the last, in steps between the levels."""
    steps = zip(levels, levels[1:], strict=False)
    return sum(noise.between(high, low) * math.sqrt(high - low) for high, low in steps)  # type: ignore[return-value]


def test_brownian_noise_is_one_path_whatever_the_steps() -> None:
    coarse, fine = (SeededNoise([1, 2], SHAPE, sigmas=SIGMAS) for _ in range(2))
    fine_levels = [float(level) for level in np.geomspace(14.6146, 0.0292, 40)]
    torch.testing.assert_close(path(coarse, SIGMAS[:-1]), path(fine, fine_levels), atol=1e-4, rtol=1e-4)


def test_brownian_noise_has_unit_variance() -> None:
    noise = SeededNoise([1, 2], (4, 64, 64), sigmas=SIGMAS)
    for high, low in zip(SIGMAS, SIGMAS[1:-1], strict=False):
        drawn = noise.between(high, low)
        assert abs(float(drawn.mean())) < 5 / math.sqrt(drawn.numel())
        assert abs(float(drawn.var()) - 1) < 5 * math.sqrt(2 / drawn.numel())


def test_brownian_noise_is_that_of_k_diffusion() -> None:
    """With the levels of the run given, as A1111 and ComfyUI make it."""
    k_sampling, _ = load_k_diffusion()
    levels = torch.tensor(SIGMAS)
    theirs = k_sampling.BrownianTreeNoiseSampler(torch.zeros(2, *SHAPE), levels[-2], levels[0], seed=[5, 6])
    ours = SeededNoise([5, 6], SHAPE, sigmas=SIGMAS)
    for high, low in zip(SIGMAS, SIGMAS[1:-1], strict=False):
        torch.testing.assert_close(ours.between(high, low), theirs(high, low), atol=2e-5, rtol=2e-5)


def test_brownian_noise_needs_no_levels_of_a_run() -> None:
    noise = SeededNoise([5], SHAPE)
    assert abs(float(noise.between(14.0, 0.03).std()) - 1) < 0.1


def test_noise_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    for spec in SPECS:
        noise = SeededNoise([1, 2], SHAPE, spec=spec)
        noise(), noise(), noise.between(2.0, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"source": "gpu"}, "source='gpu': one of cpu, device, philox"),
        ({"variation_strength": 0.5}, "variation_seed=None"),
        ({"variation_seed": 1, "variation_strength": 1.5}, "variation_strength=1.5"),
        ({"variation_seed": -1}, "variation_seed=-1"),
        ({"resize_from": (0, 4)}, r"resize_from=\(0, 4\)"),
    ],
)
def test_impossible_noise_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSpec(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["cpu", "philox"])
@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_out_of_range_are_refused(seed: int, source: str) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        SeededNoise([seed], SHAPE, spec=NoiseSpec(source))
