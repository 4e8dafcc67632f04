"""CLIP: the text encoder that conditions the U-Net, and the image tower that it is trained against.

Radford et al. 2021. Knows nothing of files, of strings or of how many layers a family skips: that is an argument.
Names as in `cond_stage_model.transformer.*` of the original checkpoints and `CLIPModel` of the published weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import Embedding, attend, check_heads

# Heads are 64 numbers wide in every published CLIP but the image towers of OpenCLIP's H, g and bigG.
HEAD_WIDTH = 64
IMAGE_HEADS = {1280: 16, 1408: 16, 1664: 16}


def image_heads(width: int) -> int:
    """The attention heads of a published image tower of this width."""
    return IMAGE_HEADS.get(width, max(1, width // HEAD_WIDTH))


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of the text encoder. The defaults are CLIP ViT-L/14's, of SD 1.x: 123,060,480 parameters.

    `projection` is the width of the pooled text, None where nothing is pooled.
    """

    vocab_size: int = 49408
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    quick_gelu: bool = True
    projection: int | None = None


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of the image tower. The defaults are CLIP ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    quick_gelu: bool = True


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space that they share."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    embed_dim: int = 768


# Radford et al. 2021, SD 1.x and one of XL's two. OpenCLIP (Cherti et al. 2022): H in SD 2.x, G (bigG) in XL.
CLIP_L_TEXT = CLIPTextConfig()
OPENCLIP_H_TEXT = CLIPTextConfig(width=1024, num_layers=24, num_heads=16, quick_gelu=False, projection=1024)
OPENCLIP_G_TEXT = CLIPTextConfig(width=1280, num_layers=32, num_heads=20, quick_gelu=False, projection=1280)
CLIP_L_VISION = CLIPVisionConfig()
OPENCLIP_H_VISION = CLIPVisionConfig(width=1280, num_layers=32, num_heads=16, quick_gelu=False)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_heads(width, num_heads)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, causal))


class MLP(nn.Module):
    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)  # 1.702: Hendrycks & Gimpel 2016
        return self.fc2(x)


class EncoderLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width, quick_gelu)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class TransformerEncoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.num_heads, config.quick_gelu) for _ in range(config.num_layers)
        )

    def forward(self, x: Tensor, causal: bool, start: int = 0, stop: int | None = None) -> Tensor:
        """x (B, L, D) through the layers from `start` to before `stop` (None: all that follow)."""
        for layer in self.layers[start:stop]:
            x = layer(x, causal)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.max_length, config.width)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        return self._words(ids, extra) + self.position_embedding.weight[: ids.shape[1]]

    def _words(self, ids: Tensor, extra: Tensor | None) -> Tensor:
        """ids (B, L) -> vectors (B, L, D); those beyond the vocabulary are rows of `extra` (K, D)."""
        if extra is None:
            return self.token_embedding(ids)
        width = self.token_embedding.embedding_dim
        if extra.ndim != 2 or extra.shape[1] != width:
            raise ValueError(f"extra: vectors of shape {tuple(extra.shape)}, this text encoder needs (K, {width})")
        own = known(ids, self.token_embedding.num_embeddings)
        words = self.token_embedding(own)
        rows = extra.to(words)[(ids - self.token_embedding.num_embeddings).clamp(min=0)]
        return torch.where((ids == own)[..., None], words, rows)


class TextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TransformerEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


def known(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids with 0 in the place of those beyond the vocabulary."""
    return ids.where(ids < vocab_size, torch.zeros_like(ids))


def at_end(x: Tensor, ids: Tensor) -> Tensor:
    """x (B, L, D) -> (B, D) at each sequence's first end token, the highest id of the vocabulary; ids (B, L)."""
    return x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]


class CLIPText(nn.Module):
    """Token ids (B, L <= 77) -> states of every token (B, L, D), the context of cross-attention.

    An id of vocab_size + k is row k of `extra` (K, D), the vectors of words that the vocabulary lacks (Gal et al.
    2022); gradients reach them. ValueError where they have another width.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor, skip_last: int = 0, final_norm: bool = True, extra: Tensor | None = None) -> Tensor:
        """States after the last layer but `skip_last` (1: the penultimate), normalised unless `final_norm` is off.

        ValueError where the encoder has not that many layers.
        """
        x = self._states(ids, skip_last, extra)
        return self.text_model.final_layer_norm(x) if final_norm else x

    def forward_pooled(
        self, ids: Tensor, skip_last: int = 0, final_norm: bool = True, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the pooled text (B, projection); each layer runs once.

        Pooled is the last layer's state at the first end token, normalised and projected, whatever `skip_last` and
        `final_norm` are (Podell et al. 2023, section 2.1). ValueError also where the config has no `projection`.
        """
        if self.config.projection is None:
            raise ValueError("projection=None: this text encoder gives no pooled text")
        x = self._states(ids, skip_last, extra)
        last = self.text_model.encoder(x, causal=True, start=self.config.num_layers - skip_last)
        pooled = self.text_projection(
            self.text_model.final_layer_norm(at_end(last, known(ids, self.config.vocab_size)))
        )
        return self.text_model.final_layer_norm(x) if final_norm else x, pooled

    def _states(self, ids: Tensor, skip_last: int, extra: Tensor | None) -> Tensor:
        num_layers = self.config.num_layers
        if not 0 <= skip_last < num_layers:
            raise ValueError(f"skip_last={skip_last}: this text encoder allows 0 to {num_layers - 1}")
        embedded = self.text_model.embeddings(ids, extra)
        return self.text_model.encoder(embedded, causal=True, stop=num_layers - skip_last)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = Embedding((config.image_size // config.patch_size) ** 2 + 1, config.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(images.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # spelt so in the published weights
        self.encoder = TransformerEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)), causal=False)
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers. Features are unit vectors (B, E); `logit_scale` is the log of the inverse temperature."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        if config.text.projection not in (None, config.embed_dim):
            raise ValueError(f"projection={config.text.projection}: the towers share embed_dim={config.embed_dim}")
        self.config = config
        self.text_model = TextModel(config.text)
        self.vision_model = VisionModel(config.vision)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # Radford et al. 2021, section 2.5
        self._initialise()

    def _initialise(self) -> None:
        """Small normal weights, residual branches scaled down by depth, as Radford et al. 2019 section 2.3."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                width = parameter.shape[-1] if parameter.ndim == 2 else parameter[0].numel()
                std = 0.02 if "embedding" in name and "patch" not in name else width**-0.5
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    layers = self.config.text.num_layers if "text" in name else self.config.vision.num_layers
                    std *= (2 * layers) ** -0.5
                nn.init.normal_(parameter, std=std)

    def text_features(self, ids: Tensor) -> Tensor:
        """ids (B, L); each sequence is read at its first end token, the highest id of the vocabulary."""
        x = at_end(self.text_model.encoder(self.text_model.embeddings(ids), causal=True), ids)
        return F.normalize(self.text_projection(self.text_model.final_layer_norm(x)), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S), already normalised to the mean and deviation that the tower was trained with."""
        return F.normalize(self.visual_projection(self.vision_model(images)), dim=-1)
