"""`florence-vl plan`: estimate the cost of a recipe without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from florence_vl.train.plan import CostPlan

epilog = """[bold]Examples[/bold]

  florence-vl plan paper/8b-pretrain --devices 64 --device h100-80gb

  florence-vl plan llava15/vicuna-7b-finetune --devices 8 --device a100-80gb --mfu 0.35 micro_batch_size=4

  florence-vl plan mini/pretrain --json"""


def command(
    recipe: str = typer.Argument(..., help="Name or path of a recipe."),
    overrides: list[str] = typer.Argument(None, help="Overrides, key.path=value.", show_default=False),
    devices: int = typer.Option(1, "--devices", min=1, help="Number of devices."),
    device: str = typer.Option("h100-80gb", "--device", help="Type of device."),
    mfu: float = typer.Option(0.4, "--mfu", help="Assumed fraction of the peak FLOPS (model FLOPs utilization)."),
    images: float = typer.Option(1.0, "--images", min=0, help="Images per average sample."),
    text_tokens: float = typer.Option(180.0, "--text-tokens", min=1, help="Text tokens per average sample."),
    supervised: float = typer.Option(120.0, "--supervised", min=1, help="Supervised text tokens per average sample."),
    samples: int = typer.Option(None, "--samples", help="Samples of the run, if the recipe does not determine them."),
    beside: str = typer.Option(
        None, "--beside", help="Recipe to compare the estimated speed with; by default that without -fast."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Estimate parameters, FLOPs, memory, micro-batch, tokens/s and device-hours of a recipe, with the assumptions."""
    import json

    from florence_vl.train.plan import Workload, plan_recipe
    from florence_vl.train.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    workload = Workload(images, text_tokens, supervised)
    plan = plan_recipe(loaded, devices, device, mfu, workload, samples)
    if beside is None and loaded.name.endswith("-fast"):
        beside = loaded.name.removesuffix("-fast")
    other = None if beside is None else plan_recipe(load_recipe(beside), devices, device, mfu, workload, samples)
    if as_json:
        found = plan.to_dict()
        if other is not None:
            found["beside"] = {"recipe": other.recipe, "gain": _gain(plan, other), "estimate": vars(other.estimate)}
        print(json.dumps(found, indent=1))
        return
    total, trainable = (sum(p[i] for p in plan.parameters.values()) for i in (0, 1))
    print(f"{plan.recipe} on {plan.devices} x {plan.device}, {plan.strategy}")
    print("\nparameters")
    for part, (count, trains) in plan.parameters.items():
        print(f"  {part:<12}{count:>16,}   trainable {trains:>16,}")
    print(f"  {'all':<12}{total:>16,}   trainable {trainable:>16,}")
    flops = sum(plan.flops_per_sample.values())
    print(f"\nFLOPs per training sample ({plan.image_tokens} tokens per image, {plan.sample_tokens:.0f} in total)")
    for part, value in plan.flops_per_sample.items():
        print(f"  {part:<12}{value / 1e12:>12.4g} TFLOP  {value / flops:>6.1%}")
    print(f"  {'all':<12}{flops / 1e12:>12.4g} TFLOP")
    print(f"\nmemory per device at micro_batch_size {loaded.micro_batch_size}")
    for kind, value in plan.memory.items():
        print(f"  {kind:<24}{value:>10.2f} GiB")
    verdict = "fits" if plan.fits else "does NOT fit"
    print(f"  {'all':<24}{sum(plan.memory.values()):>10.2f} GiB of {plan.memory_available:.1f}: {verdict}")
    print(f"  largest micro_batch_size that fits: {plan.largest_micro_batch}")
    if plan.largest_micro_batch == 0:
        print("  try activation_checkpointing.llm=full activation_checkpointing.tower=full, more devices, or LoRA")
    print(f"\nat {mfu:.0%} MFU: {plan.samples_per_s:,.1f} samples/s, {plan.tokens_per_s:,.0f} tokens/s")
    for one in (plan, other) if other is not None else (plan,):
        print(_describe(one))
    if other is not None:
        print(f"estimated gain of {plan.recipe} over {other.recipe}: {_gain(plan, other):.2f}x")
    if plan.device_hours is not None and plan.hours is not None and plan.flops_per_run is not None:
        print(
            f"the run: {plan.samples:,} samples, {plan.flops_per_run:.3g} FLOP, {plan.device_hours:,.4g} device-hours, "
            f"{plan.hours:,.4g} h wall time"
        )
    print("\nassumptions")
    for text in plan.assumptions:
        print(f"  - {text}")


def _gain(plan: CostPlan, other: CostPlan) -> float:
    return plan.estimate.samples_per_s / other.estimate.samples_per_s


def _describe(plan: CostPlan) -> str:
    useful, estimate = sum(plan.flops_per_sample.values()), plan.estimate
    return (
        f"estimate of {plan.recipe}: {estimate.samples_per_s:,.1f} samples/s; a step computes for "
        f"{estimate.compute_seconds:.2f} s (recomputation +{estimate.recomputed / useful:.0%}, masked attention "
        f"+{estimate.masked / useful:.0%}) and exchanges for {estimate.exchange_seconds:.2f} s"
    )
