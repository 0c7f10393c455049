"""Batches from the data section of a recipe: sources -> mixture -> encode -> packing, or shards through energon."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.data.layout import BatchLayout
from florence_vl.data.mixture import Mixture, MixtureSource
from florence_vl.data.packing import Batches, Share, WindowPlan, build_batches, count_steps, stop_workers
from florence_vl.data.readers import Reader, files, open_reader
from florence_vl.data.records import Record
from florence_vl.data.trees import keep_pictures_together
from florence_vl.train.config import DataConfig, Recipe, SourceConfig, StreamConfig

if TYPE_CHECKING:
    from florence_vl.data.stream import StreamBatches
    from florence_vl.train.world import World


class LimitedReader:
    """Restricts a reader to its first records.

    Args:
        reader: Any reader.
        limit: Number of records to keep.
    """

    def __init__(self, reader: Any, limit: int) -> None:
        self.reader, self.limit = reader, limit
        self.block = getattr(reader, "block", 1)
        self.shares_pictures = getattr(reader, "shares_pictures", False)

    def __len__(self) -> int:
        return min(self.limit, len(self.reader))

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of the first {len(self)}")
        return self.reader[index]


def open_source(source: SourceConfig) -> Reader | LimitedReader:
    """Open the reader of a source.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The reader, data set or option is unknown.
    """
    from florence_vl.data.sources import open_dataset, writers

    path = Path(source.path)
    if path.name == "data.jsonl" and not files.exists(source.path) and (words := writers().get(source.name or "")):
        command = shlex.join(["florence-vl", *words, "--out", str(path.parent)])
        raise FileNotFoundError(f"no such data file: {source.path}. This command writes it: {command}")
    options = dict(source.options)
    if source.image_root is not None:
        options["image_root"] = source.image_root
    if source.name is not None:
        options["name"] = source.name
    if source.dataset is not None:
        if source.reader is not None:
            raise ValueError(f"source {source.path!r}: give `dataset` or `reader`, not both")
        reader = open_dataset(source.dataset, source.path, **options)
    else:
        reader = open_reader(source.path, source.reader, **options)
    return reader if source.limit is None else LimitedReader(reader, source.limit)


def build_mixture(
    sources: Sequence[SourceConfig], config: DataConfig, seed: int, shuffle: bool | None = None
) -> Mixture:
    """Build the recipe's mixture; `shuffle` overrides the recipe's value.

    Raises:
        ValueError: There are no sources, or as in `open_source`.
    """
    if not sources:
        raise ValueError("the recipe names no data: set data.sources, or data.stream for shards")
    shuffled = config.shuffle if shuffle is None else shuffle
    opened: list[MixtureSource] = []
    names: dict[str, int] = {}
    for source in sources:
        name = source.name or source.dataset or Path(source.path).stem
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        reader = open_source(source)
        look = config.packing.trees and shuffled and getattr(reader, "shares_pictures", False)
        together = keep_pictures_together(reader) if look else None
        opened.append(MixtureSource(unique, reader, source.weight, together))
    return Mixture(opened, weighting=config.weighting, seed=seed, shuffle=shuffled)


def require_energon() -> None:
    """Check that the reader of streams is installed.

    Raises:
        ValueError: megatron-energon is missing.
    """
    try:
        import megatron.energon  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"data.stream reads shards through megatron-energon ({error}): pip install 'florence-vl[stream]'"
        ) from None


def apply_template(processor: Any, config: DataConfig) -> None:
    """Set the recipe's chat template on the processor, so that the saved model uses the template of its training.

    Raises:
        ValueError: The template or an option is unknown, or the tokenizer does not support the template.
    """
    if config.template is None:
        return
    from florence_vl.model.chat_template import CHAT_TEMPLATES

    template = CHAT_TEMPLATES[config.template]
    processor.chat_template = template.build(processor.tokenizer, processor.image_token, **config.template_options)


def plan_on_first(world: World) -> Share:
    """The first process plans and tells the others, in a small collective for each window of records.

    Every process must take its micro-batches in the same rhythm, as training does.
    """

    def share(make: Callable[[], Iterator[WindowPlan]]) -> Iterator[WindowPlan]:
        plans = make() if world.is_main else iter(())
        try:
            while True:
                yield world.decide(lambda: next(plans))
        finally:
            stop_workers(plans)

    return share


class TrainingData:
    """Batches of a recipe for any process and step.

    Args:
        recipe: Its `data`, `batch_size`, `micro_batch_size` and `seed` are used.
        processor: The model's processor; the recipe's chat template is set on it.
        share: How processes share the planning of rows, see `build_batches`; None plans in each.

    Raises:
        ValueError: A source, the template or the sizes are invalid.
    """

    def __init__(self, recipe: Recipe, processor: Any, share: Share | None = None) -> None:
        from florence_vl.data.encode import RecordEncoder, ViewDraws
        from florence_vl.model.views import FULL_VIEW

        config = recipe.data
        apply_template(processor, config)
        self.recipe, self.config, self.processor = recipe, config, processor
        self._share = {} if share is None else {"share": share}
        self._mixture: Mixture | None = None
        if config.stream is not None:
            require_energon()
        else:
            self._mixture = build_mixture(config.sources, config, recipe.seed)
        views = None
        if config.views is not None or config.feature_dropout:
            views = ViewDraws(config.views or {FULL_VIEW: 1.0}, config.feature_dropout, recipe.seed)
        max_length = config.max_length
        if max_length is None and config.packing.mode == "packed":
            max_length = config.packing.tokens_per_row  # turns are truncated to a row
        self.encoder = RecordEncoder(
            processor,
            max_length=max_length,
            on_long=config.on_long,
            views=views,
            distill=recipe.distill > 0,
        )
        self.plan = BatchLayout(
            **vars(config.packing),
            batch_size=recipe.micro_batch_size,
            global_batch_size=recipe.batch_size,
            max_bad_share=config.max_bad_share,
            bad_records_file=str(recipe.run_dir / "bad_records.jsonl"),
        )

    @property
    def mixture(self) -> Mixture:
        """The sources.

        Raises:
            ValueError: The recipe streams its data.
        """
        if self._mixture is None:
            assert self.config.stream is not None
            raise ValueError(
                "the recipe streams its data (data.stream), whose records have no numbers; look at the shards "
                f"themselves: florence-vl data inspect {self.config.stream.path}"
            )
        return self._mixture

    def batches(
        self, start_step: int, rank: int, size: int, state: Mapping[str, Any] | None
    ) -> Batches | StreamBatches:
        """The batches of one process from a step on.

        Args:
            start_step: Number of optimizer steps done.
            rank: Rank of this process.
            size: Number of processes.
            state: Data state of the checkpoint, of all ranks; a stream cannot resume without it.

        Raises:
            ValueError: The sizes do not divide, or the state belongs to other data or another number of processes.
        """
        if self.config.stream is not None:
            return self._stream(self.config.stream, start_step, rank, size, state)
        return build_batches(
            self.mixture,
            self.encoder,
            self.plan,
            seed=self.recipe.seed,
            rank=rank,
            world_size=size,
            start_step=start_step,
            num_workers=self.config.workers,
            state=state,
            pin_memory=True,
            **self._share,
        )

    def _stream(
        self, config: StreamConfig, start_step: int, rank: int, size: int, state: Mapping[str, Any] | None
    ) -> StreamBatches:
        from florence_vl.data.stream import build_stream

        if start_step and state is None:
            raise ValueError(
                f"the checkpoint of step {start_step} contains no data state, which a data.stream needs to resume"
            )
        return build_stream(
            config.path,
            self.encoder,
            self.plan,
            seed=self.recipe.seed,
            rank=rank,
            world_size=size,
            num_workers=self.config.workers,
            state=state,
            shuffle_buffer=config.shuffle_buffer,
            name=config.name,
            caption=config.caption,
            prompts=config.prompts,
            strip_prefixes=config.strip_prefixes,
            filters=config.filters,
        )

    def steps(self, epochs: float) -> int:
        """Number of optimizer steps in `epochs` passes over the mixture."""
        return count_steps(self.mixture, self.encoder, self.plan, epochs, self.recipe.seed)
