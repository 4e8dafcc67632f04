"""Training data: sets of captioned pictures at any scale, their sizes and order, and caches of latents.

Knows no loss. The batch of step k is a function of (seed, k) alone, so a run can resume anywhere.
"""

from sfumato.train.data.bucketed import Bucketed
from sfumato.train.data.buckets import NOVELAI, SDXL, bucket_sizes
from sfumato.train.data.captioned import CaptionedBatch, CaptionedShards
from sfumato.train.data.latents import CachedLatents, LatentBatch, LatentBatches, cache_latents, fingerprint
from sfumato.train.data.opening import open_pictures
from sfumato.train.data.order import BatchOrder, Examples, Ordered, indices_at, indices_of, share, shuffled
from sfumato.train.data.pictures import Pictures
from sfumato.train.data.report import Report

__all__ = [
    "NOVELAI",
    "SDXL",
    "BatchOrder",
    "Bucketed",
    "CachedLatents",
    "CaptionedBatch",
    "CaptionedShards",
    "Examples",
    "LatentBatch",
    "LatentBatches",
    "Ordered",
    "Pictures",
    "Report",
    "bucket_sizes",
    "cache_latents",
    "fingerprint",
    "indices_at",
    "indices_of",
    "open_pictures",
    "share",
    "shuffled",
]
