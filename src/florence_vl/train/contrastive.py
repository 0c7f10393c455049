"""Contrastive loss of images and texts with duplicates, for the projector's warm-up and the alignment loss.

Shape letters: N pairs, M rows of a block, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Groups:
    """Pairs with the same caption or image, as ids of captions and images.

    Args:
        caption_N: Equal for pairs with the same caption.
        image_N: Equal for pairs with the same image.
    """

    caption_N: Tensor
    image_N: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], images: Sequence[bytes]) -> Groups:
        """Number captions (ignoring case and white space) and image keys."""
        plain = [" ".join(c.lower().split()) for c in captions]
        return cls(_number(plain), _number(list(images)))

    def __getitem__(self, rows: Tensor) -> Groups:
        return Groups(self.caption_N[rows], self.image_N[rows])

    def __len__(self) -> int:
        return len(self.caption_N)

    def to(self, device: torch.device) -> Groups:
        """Move both."""
        return Groups(self.caption_N.to(device), self.image_N.to(device))

    def same(self, rows: slice) -> Tensor:
        """(rows, N) whether two pairs share their caption or their image."""
        same = self.caption_N[rows, None] == self.caption_N[None]
        return same | (self.image_N[rows, None] == self.image_N[None])

    def targets(self, chunk: int = 2048) -> Tensor | None:
        """Sparse target matrix (N, N) with rows that sum to 1: the pair itself and its duplicates, evenly.

        Returns:
            The matrix; None if there are no duplicates, so that the target is the identity.
        """
        count = len(self)
        if len(self.caption_N.unique()) == count and len(self.image_N.unique()) == count:
            return None
        index, value = [], []
        for start in range(0, count, chunk):
            same_MN = self.same(slice(start, min(start + chunk, count)))
            rows, columns = same_MN.nonzero(as_tuple=True)
            index.append(torch.stack([rows + start, columns]))
            value.append((1.0 / same_MN.sum(1))[rows])
        matrix = torch.sparse_coo_tensor(torch.cat(index, 1), torch.cat(value), (count, count), check_invariants=False)
        return matrix.coalesce()

    def components(self) -> Tensor:
        """(N,) id of the connected component of each pair by captions or images; splits never separate a component."""
        parent: dict[tuple[str, int], tuple[str, int]] = {}

        def root(node: tuple[str, int]) -> tuple[str, int]:
            while parent.setdefault(node, node) != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        nodes = [(("c", c), ("i", i)) for c, i in zip(self.caption_N.tolist(), self.image_N.tolist(), strict=True)]
        for caption, image in nodes:
            parent[root(caption)] = root(image)
        return _number([root(caption) for caption, _ in nodes])

    def first(self) -> Tensor:
        """Rows that are the first with both their caption and their image."""
        captions: set[int] = set()
        images: set[int] = set()
        rows = []
        for row, (c, i) in enumerate(zip(self.caption_N.tolist(), self.image_N.tolist(), strict=True)):
            if c not in captions and i not in images:
                rows.append(row)
            captions.add(c)
            images.add(i)
        return torch.tensor(rows, dtype=torch.long)


def _number(values: Sequence[object]) -> Tensor:
    ids: dict[object, int] = {}
    return torch.tensor([ids.setdefault(v, len(ids)) for v in values], dtype=torch.long)


def contrastive_loss(
    vision_ND: Tensor,
    text_ND: Tensor,
    targets_NN: Tensor | None = None,
    temperature: float = 1.0,
    symmetric: bool = False,
    chunk: int = 2048,
    backward: bool = False,
) -> Tensor:
    """Cross-entropy of the similarity matrix of unit vectors against the identity or given targets.

    Computed in blocks of rows, so that memory is `chunk` x N.

    Args:
        vision_ND: (N, D) unit vectors.
        text_ND: (N, D) unit vectors.
        targets_NN: (N, N) sparse targets, rows summing to 1 (`Groups.targets`); None for the identity.
        temperature: Divides the similarities.
        symmetric: Mean of both directions instead of vision to text.
        chunk: Rows per block.
        backward: Add the gradient to `vision_ND.grad` immediately, block by block.

    Returns:
        The loss, a scalar (without a graph if `backward`).
    """
    total = vision_ND.new_zeros(())
    count = len(vision_ND)
    directions = [(vision_ND, text_ND), (text_ND, vision_ND)][: 2 if symmetric else 1]
    scale = 1 / (count * len(directions))
    for queries_ND, keys_ND in directions:
        # cross-entropy = logsumexp of the row - the target-weighted mean of its similarities; that mean is linear
        aims_ND = keys_ND if targets_NN is None else torch.sparse.mm(targets_NN, keys_ND)
        loss = -(queries_ND * aims_ND).sum() * (scale / temperature)
        if backward:
            loss.backward()
        total = total + loss.detach() if backward else total + loss
        for start in range(0, count, chunk):
            logits_MN = (queries_ND[start : start + chunk] / temperature) @ keys_ND.T
            loss = logits_MN.logsumexp(dim=1).sum() * scale
            if backward:
                loss.backward()
            total = total + loss.detach() if backward else total + loss
    return total
