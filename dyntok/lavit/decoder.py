"""The decoder whose features a diffusion model turns into a picture."""

from dyntok.lavit.conditioning import Conditioning
from dyntok.lavit.config import LavitDecoderConfig
from dyntok.model.decoder import Decoder


class LavitDecoder(Decoder):
    """A `Decoder` that can turn its features into the conditioning of a diffusion model.

    Its configuration says whether it has the layers for that.
    """

    def __init__(
        self, grid: tuple[int, int], code_dim: int, width: int, config: LavitDecoderConfig, *, dithered: bool = False
    ) -> None:
        super().__init__(grid, code_dim, width, config, dithered=dithered)
        self.conditions: Conditioning | None = None
        if config.conditions is not None:
            self.conditions = Conditioning(self.out_dim, grid[0] * grid[1], config.conditions)
