"""Metrics, resizing and networks against torchmetrics, torch-fidelity and clean-fid.

torch-fidelity wants torchvision, which cannot be beside every torch, and clean-fid is of no use to any other test:
where one is not installed its tests are skipped. Nothing of torchvision is used: an empty one stands in for the import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from sfumato.evaluate import metrics
from sfumato.evaluate.features import features_of, open_features
from sfumato.evaluate.resizing import resized
from sfumato.evaluate.statistics import statistics_of
from sfumato.models.inception import Inception

from .peers import _bare
from .test_evaluate_features import random_network
from .test_evaluate_metrics import DRAWN, REAL, rng
from .test_evaluate_statistics import FACTS


def peer(name: str) -> ModuleType:
    """A module of a peer; skips the test without it. torchmetrics itself takes in torch-fidelity where it is there."""
    for package in ("torch_fidelity", name.partition(".")[0]):
        if importlib.util.find_spec(package) is not None:
            _imported(package)
        elif name.startswith(package):
            pytest.skip(f"{package} is not installed")
    return importlib.import_module(name)


def _imported(package: str) -> None:
    stands: dict[str, ModuleType] = {}
    if package == "torch_fidelity" and importlib.util.find_spec("torchvision") is None:
        names = ("", ".datasets", ".transforms", ".transforms.functional")
        stands = {f"torchvision{part}": _bare(f"torchvision{part}") for part in names}
        vars(stands["torchvision"]).update(transforms=stands["torchvision.transforms"])
        vars(stands["torchvision.transforms"]).update(functional=stands["torchvision.transforms.functional"])
        vars(stands["torchvision.datasets"]).update(CIFAR10=object, STL10=object, CIFAR100=object)
    sys.modules.update(stands)
    try:
        importlib.import_module(package)
    finally:
        for part in stands:
            del sys.modules[part]


def pair():
    return torch.from_numpy(REAL), torch.from_numpy(DRAWN)


# --- torchmetrics


def test_fid_is_torchmetrics():
    a, b = pair()
    found = peer("torchmetrics.image.fid")._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())  # N - 1 as well
    assert metrics.fid(statistics_of(REAL, FACTS), statistics_of(DRAWN, FACTS)) == pytest.approx(found.item(), rel=1e-6)


def test_kid_is_torchmetrics():
    """Of one set of all features, so that no random choice is left."""
    a, b = pair()
    ours = metrics.kid(REAL[:500], DRAWN, rng(), subsets=3)
    assert ours.value == pytest.approx(peer("torchmetrics.image.kid").poly_mmd(a[:500], b).item(), rel=1e-9)
    assert ours.deviation < 1e-12


class Given(torch.nn.Module):
    """In place of torchmetrics' network: what it is given are the features."""

    num_features = 24

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
def test_inception_score_is_torchmetrics():
    """It shuffles before it splits and divides the spread by one less, so only one split of all compares."""
    found = peer("torchmetrics.image.inception").InceptionScore(feature=Given(), splits=1)
    found.update(torch.from_numpy(DRAWN))
    assert metrics.inception_score(DRAWN, splits=1).value == pytest.approx(found.compute()[0].item(), rel=1e-6)


# --- torch-fidelity


def test_fid_is_torch_fidelitys():
    ours = metrics.fid(statistics_of(REAL, FACTS), statistics_of(DRAWN, FACTS))
    fidelity = peer("torch_fidelity.metric_fid")
    stats = [fidelity.fid_features_to_statistics(torch.from_numpy(features)) for features in (REAL, DRAWN)]
    assert ours == pytest.approx(fidelity.fid_statistics_to_metric(*stats, False)[fidelity.KEY_METRIC_FID], rel=1e-6)


def test_kid_is_torch_fidelitys():
    fidelity = peer("torch_fidelity.metric_kid")
    a, b = torch.from_numpy(REAL[:500]), torch.from_numpy(DRAWN)
    found = fidelity.kid_features_to_metric(a, b, kid_subsets=2, kid_subset_size=500, verbose=False)
    ours = metrics.kid(REAL[:500], DRAWN, rng(), subsets=2)
    assert ours.value == pytest.approx(found[fidelity.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_kids_spread_is_torch_fidelitys_within_its_error():
    """The subsets are other random ones: the mean agrees within its error, the spread within a third."""
    fidelity = peer("torch_fidelity.metric_kid")
    a, b = torch.from_numpy(REAL), torch.from_numpy(DRAWN)
    found = fidelity.kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=100, verbose=False)
    ours = metrics.kid(REAL, DRAWN, rng(), 100, 100)
    mean, spread = found[fidelity.KEY_METRIC_KID_MEAN], found[fidelity.KEY_METRIC_KID_STD]
    assert abs(ours.value - mean) < 4 * spread / 100**0.5
    assert ours.deviation == pytest.approx(spread, rel=0.33)


@pytest.mark.parametrize("splits", [1, 7, 10])
def test_inception_score_is_torch_fidelitys(splits):
    fidelity = peer("torch_fidelity.metric_isc")
    found = fidelity.isc_features_to_metric(torch.from_numpy(DRAWN), splits=splits, shuffle=False)
    ours = metrics.inception_score(DRAWN, splits)
    assert ours.value == pytest.approx(found[fidelity.KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert ours.deviation == pytest.approx(found[fidelity.KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("neighbours", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(neighbours):
    """Its order is drawn, real."""
    fidelity = peer("torch_fidelity.metric_prc")
    drawn = np.concatenate([DRAWN[:300], REAL[:30]])
    a, b = torch.from_numpy(drawn), torch.from_numpy(REAL)
    found = fidelity.prc_features_to_metric(
        a, b, prc_neighborhood=neighbours, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    precision, recall = metrics.precision_recall(REAL, drawn, neighbours)
    assert 0.1 < precision < 1 and 0.1 < recall < 1
    assert precision == pytest.approx(found[fidelity.KEY_METRIC_PRECISION], abs=1e-6)
    assert recall == pytest.approx(found[fidelity.KEY_METRIC_RECALL], abs=1e-6)


# --- resizing


def pictures():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (97, 350, 3), (400, 310, 3))]


@pytest.mark.parametrize("ours, theirs", [("clean", "clean"), ("legacy-torch", "legacy_pytorch")])
def test_resizing_is_clean_fids(ours, theirs):
    resize = peer("cleanfid.resize").build_resizer(theirs)
    for picture in pictures():
        found = resized([picture], 299, ours)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - resize(picture)).max() < 1e-3


def test_legacy_tf_is_torch_fidelitys():
    resize = peer("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    for picture in pictures():
        levels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        found = resized([picture], 299, "legacy-tf") * 255
        assert (found - resize(levels, size=(299, 299), align_corners=False)).abs().max() < 2e-2


# --- networks


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """Our network, its file, and torch-fidelity's network with the same random weights."""
    module = peer("torch_fidelity.feature_extractor_inceptionv3")
    ours = random_network(Inception())
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(ours.state_dict(), path)
    theirs = module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return ours, path, theirs


def test_the_inception_network_is_torch_fidelitys(inceptions):
    """Levels of pictures that have the size already: features, and logits without bias."""
    ours, _, theirs = inceptions
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 299, 299), dtype=np.uint8))
    wanted, wanted_logits = theirs(levels)
    with torch.inference_mode():
        features = ours((levels.float() - 128) / 128)
        logits = ours.logits(features)
    assert wanted.std() > 0.01
    assert (features - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (logits - wanted_logits).abs().max() < 1e-4 * wanted_logits.abs().max()


def test_inception_from_a_picture_to_features_is_torch_fidelitys(inceptions):
    """Reading the file, resizing as TensorFlow 1, normalising: all that lies between a picture and its features."""
    _, path, theirs = inceptions
    picture = pictures()[0]
    found = features_of(open_features(f"inception:{path}"), [picture], "legacy-tf")
    wanted, _ = theirs(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
