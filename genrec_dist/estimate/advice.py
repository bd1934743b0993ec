"""Which method a forecast recommends, or what to lower where nothing fits."""

from __future__ import annotations

from genrec_dist.estimate.forecast import BY_COST, Forecast
from genrec_dist.estimate.memory.fit import GIB
from genrec_dist.estimate.memory.state import METHODS, Method

NAMES: dict[Method, str] = {
    "ddp": "DDP",
    **{method: f"ZeRO {method[4:].replace('_', ' + ')}" for method in METHODS[1:]},
}


def advise(plan: Forecast) -> list[str]:
    """What to do, in whole sentences."""
    # Training refuses fp16 under DeepSpeed.
    methods = BY_COST if plan.recipe.precision != "fp16" else BY_COST[:1]
    by_method = {fit.method: fit for fit in plan.fits}
    fitting = [by_method[method] for method in methods if by_method[method].fits(plan.limit)]
    ddp = by_method["ddp"]
    states = (
        f"the states of {plan.sizes.dense / 1e6:,.0f} M parameters are "
        f"{16 * plan.sizes.dense / 1e9:.1f} GB"
    )
    if not fitting:
        lines = _advise_lowering(plan)
    elif ddp not in fitting:
        lines = [
            f"DDP needs {gib(ddp.peak)} of {gib(plan.limit)}: use {NAMES[fitting[0].method]}, the "
            f"fastest method that fits ({gib(fitting[0].peak)})."
        ]
    elif plan.gpus == 1:
        lines = [
            f"Use one process without ZeRO: {states}, they fit, and with one GPU there is nothing "
            "to spread."
        ]
    else:
        lines = [
            f"Use DDP, ZeRO is slower here: {states} and fit on each GPU. DDP sums gradients once "
            "per step, while backward is still running; ZeRO 1 and 2 then also send the weights "
            "around, ZeRO 3 fetches them for every forward and backward, and offload moves them "
            "through the host. All that buys is memory that is not short."
        ]
    if fitting:
        tokens, largest = plan.recipe.micro_batch_tokens, fitting[0].largest
        share = max(each.per_rank(plan.gpus) * int(each.lengths[-1]) for each in plan.samples)
        if largest < min(tokens, share):
            lines.append(
                f"micro_batch_tokens {tokens:,} only fits as steps are small; at most {largest:,} "
                "fits by itself."
            )
        elif tokens >= share:
            lines.append(
                f"A rank's share of a step has at most {share:,} encoder tokens and goes through "
                "at once: a larger micro_batch_tokens changes nothing."
            )
        else:
            lines.append(f"micro_batch_tokens can rise from {tokens:,} to {min(largest, share):,}.")
    of_ids = plan.sizes.ids / plan.sizes.parameters
    if of_ids > 1 / 2 and not plan.sizes.ids_outside:
        lines.append(
            f"The id tables are {of_ids:.0%} of the parameters: optimizer.id_tables row-adagrad "
            "takes them out of AdamW, gradients and ZeRO and spreads their rows over the GPUs; "
            "model.id_dim 64 makes them narrow."
        )
    return lines


def _advise_lowering(plan: Forecast) -> list[str]:
    best = min(plan.fits, key=lambda fit: fit.peak)
    needs = f"{NAMES[best.method]} needs least, {gib(best.peak)} of {gib(plan.limit)}"
    nothing = f"Nothing fits: {needs}."
    with_room = [fit for fit in plan.fits if fit.largest >= plan.recipe.model.max_tokens]
    if with_room:
        order = {method: place for place, method in enumerate(BY_COST)}
        first = min(with_room, key=lambda fit: order.get(fit.method, len(order)))
        return [
            nothing,
            f"Lower micro_batch_tokens to {first.largest:,} with {NAMES[first.method]}: the step "
            "and its gradient stay the same.",
        ]
    ways = ["model.max_tokens"] if plan.recipe.model.max_tokens > 128 else []
    if plan.sizes.ids > plan.sizes.parameters / 10 and not plan.sizes.ids_outside:
        ways.append("model.id_dim, or set optimizer.id_tables to row-adagrad")
    if plan.recipe.precision == "fp32":
        ways.append("precision, to bf16")
    ways.append("the backbone's size, or take more GPUs under ZeRO 3")
    return [nothing, f"Not one longest sample fits. Lower {'; '.join(ways)}."]


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
