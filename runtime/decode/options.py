"""Settings of continuous speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cspd.runtime.config import RunConfig
from cspd.runtime.decode.plan import Plan, WindowPlan


@dataclass(frozen=True)
class CspdOptions:
    """Settings of the method.

    `gamma` tokens at least are drafted per window, `prefill` is the share of tokens that the target
    generates first; `count_in` "steps" counts autoregressive steps instead (`WindowPlan`).
    `accept_temperature` widens both densities of the test: 1 is the paper's formula, 42 what the
    authors released. `align` shares the noise between draft and target. `on_reject` "target" takes
    the target's own aligned sample; "residual" draws from the residual at `residual_temperature`,
    which is 1 in the paper and in the released code; as in the test, it adds visible noise.
    """

    gamma: int = 8
    prefill: float = 0.05
    accept_temperature: float = 42.0
    verify: str = "parallel"
    align: bool = True
    on_reject: str = "target"
    residual_temperature: float = 1.0
    count_in: str = "tokens"
    max_tries: int = 100

    @classmethod
    def of(cls, config: RunConfig) -> CspdOptions:
        """The settings of a run; fields are called the same."""
        names = (item.name for item in fields(cls) if item.name in RunConfig.model_fields)
        return cls(**{name: getattr(config, name) for name in names})

    def windows(self, plan: Plan) -> WindowPlan:
        """Where the windows of an image end that is generated in the steps of `plan`."""
        return WindowPlan(plan, self.gamma, self.prefill, self.count_in == "steps")
