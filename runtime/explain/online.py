"""What transforms of activations cost at run time: block Hadamard, QUAD's directions and side products, division by
calibrated factors, low-rank corrections.

Smoothing and rotations that are folded into weights have no nodes and cost nothing. qtool names the others' nodes after
the site that they stand in front of (`…/q_proj/input/quad_16/hadamard/MatMul`) or the linear that they stand behind
(`…/down_proj/side/Add`), and the runtime's optimizer keeps these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from qtool.runtime.explain.facts import Facts
from qtool.runtime.explain.report import Explanation, Measured, OnlineShare, Trap

# Of a decode step; what takes more is warned of.
MOST = 0.05
CODE = "online-transforms"
_BEFORE = "signs|blocks|hadamard|rows|directions|side|rest|projection|division|factors"
_ONLINE = re.compile(rf"(?P<site>.+?)(?:/input/[^/]+/(?:{_BEFORE})|/(?:side|low_rank(?:_down|_up(?:_\d+)?)?))/\w+")
_REMEDY = "transform fewer inputs (qtool plan weighs each of them), or export without if its accuracy is enough"


def site_of(name: str) -> str | None:
    """The linear that an online transform's node belongs to, "model.layers.0.self_attn.q_proj"; None for others."""
    found = _ONLINE.fullmatch(name)
    return None if found is None else found["site"].strip("/").replace("/", ".")


def sites_of(names: Iterable[str]) -> tuple[str, ...]:
    """The linears that these nodes' transforms belong to, in order, once each."""
    return tuple(dict.fromkeys(site for name in names if (site := site_of(name)) is not None))


def costly_transforms(facts: Facts) -> Trap | None:
    """Online transforms that take more than MOST of a decode step, predicted."""
    return None if facts.online is None else _trap(facts.online, facts.online.decode_share, "predicted")


def with_measured(explanation: Explanation, measured: Measured) -> Explanation:
    """An explanation with its measured times, by which its online transforms are now judged."""
    online, others = explanation.online, tuple(trap for trap in explanation.traps if trap.code != CODE)
    trap = None if online is None else _trap(online, measured.online_decode_share, "measured")
    return replace(explanation, measured=measured, traps=others if trap is None else (trap, *others))


def online_line(explanation: Explanation) -> str | None:
    """What the online transforms of a file take, in a line; None where there are none."""
    online, measured = explanation.online, explanation.measured
    if online is None:
        return None
    parts = [f"{_shares(online, online.decode_share, online.prefill_share)} predicted"]
    if measured is not None:
        parts.append(f"{_shares(online, measured.online_decode_share, measured.online_prefill_share)} measured")
    return f"online transforms: {online.nodes} nodes, {'; '.join(parts)}"


def _shares(online: OnlineShare, decode: float, prefill: float) -> str:
    step = f"{_percent(decode)} of a decode step, " if online.decodes else ""
    return f"{step}{_percent(prefill)} of a prompt"


def _trap(online: OnlineShare, share: float, how: str) -> Trap | None:
    if share <= MOST or not online.decodes:
        return None
    what = f"online transforms take {_percent(share)} of a decode step ({how}, {online.nodes} nodes), more than "
    return Trap(code=CODE, warning=True, what=f"{what}{100 * MOST:.0f} %", remedy=_REMEDY, where=online.sites)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
