"""The step plan of a run, from its arguments."""

from collections.abc import Sequence

from wan_accel.arguments import WanTrainingArguments
from wan_accel.data.collate import SampleSource
from wan_accel.draws import TokenBudget
from wan_accel.models.variants import Expert, Variant
from wan_accel.objective import NoiseLevels
from wan_accel.step_plan import EpochItems, StepPlan


def default_plan(
    source: SampleSource,
    args: WanTrainingArguments,
    variant: Variant,
    experts: Sequence[Expert],
    rows: Sequence[int] | None = None,
    mixture: EpochItems | None = None,
) -> StepPlan:
    """The step plan that the arguments describe, over `rows` or all of them, as often as a mixture has them."""

    def budget(tokens: int | None, multiple_of: int = 1) -> TokenBudget | None:
        if tokens is None:
            return None
        return TokenBudget(tokens=tokens, multiple_of=multiple_of, num_tokens=variant.num_tokens)

    return StepPlan(
        source.index(),
        seed=args.seed,
        global_batch=budget(args.global_batch_tokens, args.batch_multiple_of) or args.global_batch,
        micro_batch=budget(args.micro_batch_tokens) or args.micro_batch,
        levels=NoiseLevels(
            density=args.density,
            shift=args.shift,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
        ),
        experts=experts,
        caption_dropout=args.caption_dropout,
        face_dropout=args.face_dropout,
        image_dropout=args.image_dropout,
        rows=rows,
        mixture=mixture,
    )
