"""The image tokenizer: a convolutional autoencoder with a codebook between its halves (LlamaGen's VQ-16).

Module names are those of the published checkpoints (`encoder.conv_blocks.0.res.1.conv2.weight`, ...), so a state dict
goes in and out without renaming; their `quantize.codebook_used` is a usage counter of the original trainer that no
computation reads, so it does not exist here and an exporter adds it.

Both the features and the rows of the codebook are scaled to unit length before they are compared, so a picture's ids
depend on directions alone; the decoder sees the unit rows. The comparison runs in fp32 whatever the weights' dtype:
two ids that differ by a rounding are two different pictures.

Shapes: `b` pictures, `c` channels, `d` code_dim, `g` side of the grid of ids, `n` features, `v` codebook_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_mega.config import derive
from janus_mega.config.schema import ImageTokenizerConfig

NORM_GROUPS = 32
"""Groups of every GroupNorm; all widths must be multiples of it."""
NORM_EPS = 1e-6
PIXEL_CHANNELS = 3
LOOKUP_ROWS = 8192
"""Features compared with the codebook at a time: bounds the fp32 table of similarities to LOOKUP_ROWS x v."""


def group_norm(channels: int) -> nn.GroupNorm:
    """The one normalisation of this network."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def unit(x: Tensor) -> Tensor:
    """Scale the last axis to unit length, in fp32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the skip is a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, in, H, W] to [b, out, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + hidden


class AttentionBlock(nn.Module):
    """Attention of every position over all others, one head as wide as the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, c, H, W] to the same shape."""
        hidden = self.norm(x)
        q, k, v = (part(hidden).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # [b, H * W, c]
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the sides with a strided convolution, padded on the right and bottom only as in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, c, H, W] to [b, c, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides by repetition, then a 3x3 convolution; stays in the dtype it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, c, H, W] to [b, c, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest, then the change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, with_attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(ResBlock(*widths[i : i + 2]) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if with_attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, in, H, W] to [b, out, H', W'], H' by the `downsample` or `upsample` that was hung in, if any."""
        for i, res in enumerate(self.res):
            x = res(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


def middle(channels: int) -> nn.ModuleList:
    """The three blocks at the lowest resolution, in the order in which they run."""
    return nn.ModuleList([ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Pixels to features before the codebook's projection."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        channels = config.base_channels
        for i, width in enumerate(widths):
            level = Level(channels, width, config.num_res_blocks, with_attention=i == last)
            if i != last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
            channels = width
        self.mid = middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [b, 3, H, W] to [b, latent_channels, g, g]."""
        hidden = self.conv_in(pixels)
        for block in (*self.conv_blocks, *self.mid):
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Features after the codebook's projection to pixels; one residual block more per level than the encoder."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        last = len(widths) - 1
        channels = widths[last]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = middle(channels)
        self.conv_blocks = nn.ModuleList()  # from the lowest resolution up
        for i in reversed(range(len(widths))):
            level = Level(channels, widths[i], config.num_res_blocks + 1, with_attention=i == last)
            if i != 0:
                level.upsample = Upsample(widths[i])
            self.conv_blocks.append(level)
            channels = widths[i]
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, PIXEL_CHANNELS, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Map [b, latent_channels, g, g] to [b, 3, H, W], unclipped."""
        hidden = self.conv_in(latent)
        for block in (*self.mid, *self.conv_blocks):
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Quantizer(nn.Module):
    """The codebook: nearest code by direction."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @torch.no_grad()
    def lookup(self, directions: Tensor) -> Tensor:
        """Find the nearest code of each unit feature [n, d] (fp32); returns int64 [n], the lowest id on a tie."""
        codes = unit(self.embedding.weight)
        found = [(part @ codes.T).argmax(dim=-1) for part in directions.split(LOOKUP_ROWS)]
        return torch.cat(found)

    def codes(self, ids: Tensor) -> Tensor:
        """Unit rows of the codebook for int64 ids of any shape [...]; returns fp32 [..., d]."""
        return unit(self.embedding(ids))


@dataclass(frozen=True, slots=True)
class VqOutput:
    """One pass through the tokenizer with everything that its losses need."""

    reconstruction: Tensor
    """[b, 3, H, W] in the weights' dtype, unclipped."""
    ids: Tensor
    """int64 [b, g * g], raster order."""
    directions: Tensor
    """fp32 [b, g * g, d]: unit features before the codebook, with gradient."""
    codes: Tensor
    """fp32 [b, g * g, d]: the unit codes they were replaced by, with gradient to the codebook."""


class VqModel(nn.Module):
    """Pictures in [-1, 1] to ids and back."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.grid_size = derive.generation_grid(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def directions(self, pixels: Tensor) -> Tensor:
        """Unit features of pictures [b, 3, H, W]: fp32 [b, g * g, d]."""
        latent = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))
        return unit(latent.flatten(2).transpose(1, 2))

    def encode(self, pixels: Tensor) -> Tensor:
        """Ids of pictures [b, 3, H, W] in [-1, 1]: int64 [b, g * g], raster order."""
        directions = self.directions(pixels)
        return self.quantize.lookup(directions.flatten(0, 1)).view(directions.shape[:2])

    def decode(self, ids: Tensor) -> Tensor:
        """Pictures of ids int64 [b, g * g]: [b, 3, H, W], about [-1, 1] but unclipped, in the weights' dtype."""
        return self._decode_codes(self.quantize.codes(ids))

    def forward(self, pixels: Tensor) -> VqOutput:
        """Encode and decode [b, 3, H, W]; the gradient passes the codebook as if it were the identity."""
        directions = self.directions(pixels)
        ids = self.quantize.lookup(directions.detach().flatten(0, 1)).view(directions.shape[:2])
        codes = self.quantize.codes(ids)
        straight_through = directions + (codes - directions).detach()
        return VqOutput(self._decode_codes(straight_through), ids, directions, codes)

    def _decode_codes(self, codes: Tensor) -> Tensor:
        """Decode unit codes [b, g * g, d] to [b, 3, H, W]."""
        grid = codes.transpose(1, 2).reshape(codes.shape[0], -1, self.grid_size, self.grid_size)
        return self.decoder(self.post_quant_conv(grid.to(self.post_quant_conv.weight.dtype)))


def level_widths(config: ImageTokenizerConfig) -> list[int]:
    """Channels of each resolution, the highest first."""
    return [config.base_channels * multiplier for multiplier in config.channel_multiplier]
