"""Florence-2's two position tables at sizes other than the trained one.

DaViT's feature map gets a learned row and a learned column embedding. The BART encoder numbers image tokens in one
dimension, so at another size a (row, column) is mapped to another position, and prompt features degrade silently.
`Grid2D` and `EncoderPositions` resample both tables from the trained grid to the actual one; at the trained size they
return the tables themselves, bit for bit.

Shape letters: R rows, C columns, T prompt tokens, S = [mean token] + R * C + T, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.florence2.modeling_florence2 import Florence2VisionLearnedAbsolutePositionEmbedding2D


class Grid2D(Florence2VisionLearnedAbsolutePositionEmbedding2D):
    """transformers' row and column embedding, resampled from `trained` (rows, columns) if that is set."""

    trained: tuple[int, int] | None = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(B, D, R, C) -> (B, D, R, C), the position embeddings."""
        rows, columns = pixel_values.shape[-2:]
        trained_rows, trained_columns = self.trained or (rows, columns)
        y_RD = self._table(self.row_embeddings, trained_rows, rows)
        x_CD = self._table(self.column_embeddings, trained_columns, columns)
        grid_RCD = torch.cat([x_CD.expand(rows, -1, -1), y_RD.unsqueeze(1).expand(-1, columns, -1)], dim=-1)
        return grid_RCD.permute(2, 0, 1).expand(pixel_values.shape[0], -1, -1, -1)

    @staticmethod
    def _table(embedding: nn.Embedding, trained: int, length: int) -> Tensor:
        table_LD = embedding(torch.arange(trained, device=embedding.weight.device))
        if length == trained:
            return table_LD
        resampled = nn.functional.interpolate(table_LD.T.unsqueeze(0).float(), size=length, mode="linear")
        return resampled.squeeze(0).T.to(table_LD.dtype)


class EncoderPositions(BartLearnedPositionalEmbedding):
    """BART's positions for [image tokens ; prompt tokens], added by the tower before it calls the encoder.

    The encoder's own call returns zero, so its sum does not change what the tower computed.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        grid: tuple[int, int] = (0, 0),
        trained: tuple[int, int] | None = None,
        num_prefix: int = 0,
        num_prompt: int = 0,
    ) -> Tensor:
        """Position embeddings of a sequence.

        Args:
            input_ids: The input of BART's own call, for which the result is zero.
            grid: Rows and columns of the image tokens.
            trained: The grid with which the table was trained; None numbers the tokens from 0, as BART does.
            num_prefix: Number of tokens before the grid (the mean token).
            num_prompt: Number of tokens after it, T.

        Returns:
            (S, D), or a scalar zero.
        """
        if input_ids is not None:
            return self.weight.new_zeros(())
        rows, columns = trained or grid
        num_trained = rows * columns
        numbers = torch.arange(num_prefix + num_trained + num_prompt, device=self.weight.device)
        table_SD = nn.Embedding.forward(self, numbers + self.offset)
        if (rows, columns) == grid:
            return table_SD
        prefix_PD, image_ND, prompt_TD = table_SD.split([num_prefix, num_trained, num_prompt])
        image_1DRC = image_ND.T.reshape(1, -1, rows, columns).float()
        resampled = nn.functional.interpolate(image_1DRC, size=grid, mode="bilinear")
        return torch.cat([prefix_PD, resampled[0].flatten(1).T.to(table_SD.dtype), prompt_TD])
