"""What a server's refusal is about: one row, the account, the endpoint, or a moment.

Servers tell the same in many words and under many statuses; what is known of them stands here.
"""

import re
from typing import Final, Literal

from srt_cli.models.api.dialect import BatchResult, Refused

About = Literal["pace", "trouble", "filter", "too long", "account", "endpoint", "request"]
"""Whom a refusal concerns.

`pace`: too fast, wait. `trouble`: the server's own, it passes. `filter`: this text is not wanted, and
that is final. `too long`: this row does not fit. `account`: no credit, or a wrong key. `endpoint`: a
wrong path or model, the same for every row. `request`: this request, or all, which the others tell.
"""

THROTTLED: Final = (429, 529)
QUOTA_CODES: Final = (
    "insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached",
    "exceeded_current_quota_error", "insufficient_balance", "billing_not_active",
    "account_deactivated", "insufficient_user_quota", "arrearage",
)  # fmt: skip
FILTER_CODES: Final = (
    "content_filter", "content_policy_violation", "responsibleaipolicyviolation",
    "moderation_blocked", "data_inspection_failed", "datainspectionfailed", "invalid_prompt",
    "content_moderation", "prohibited_content", "safety",
)  # fmt: skip
TOO_LONG_CODES: Final = (
    "context_length_exceeded", "exceed_context_size_error", "request_too_large",
    "string_above_max_length",
)  # fmt: skip
_NO_BALANCE: Final = re.compile(
    r"insufficient (account )?(balance|credit|fund|quota)|no (credit|balance)|credit balance|"
    r"(out of|not enough|add more) credit|exceeded your current quota|recharge|in arrears|"
    r"billing hard limit|payment required|balance is (too low|not enough)",
    re.IGNORECASE,
)
_PASSES: Final = re.compile(
    r"(retry|try again|reset)\w* (in|after|at) |per (minute|second|day|hour)", re.I
)
_FILTERED: Final = re.compile(
    r"\bflagged\b|moderation|content[ _-]?(management[ _-])?(policy|filter)|"
    r"safety (system|filter|policy)|responsible ai|usage polic|inappropriate content|"
    r"sensitive (content|word)|prohibited (content|use)|"
    r"blocked (by|due to|because of) .*(safety|policy|filter|guardrail)|guardrail",
    re.IGNORECASE,
)
_TOO_LONG: Final = re.compile(
    r"context[ _](length|size|window)|too (long|large|many (input )?tokens)|reduce the (length|number)|"
    r"(prompt|input|request|messages?) (is|are|was|exceeds?|has|have) .*(long|token|exceed)|"
    r"tokens must be reduced|maximum (input|sequence|prompt) length|"
    r"max_(completion_)?tokens.* (must|exceed|too large)|exceeds? the .*(tokens|length)",
    re.IGNORECASE,
)
_UNKNOWN_MODEL: Final = re.compile(
    r"(invalid|unknown|unsupported|no such) model|"
    r"model\b[^.]{0,120}(not (exist|found|a valid|available|supported)|does ?n[o']t exist|is unknown|"
    r"is invalid|is not)|not a valid model|model[_ ]not[_ ]found",
    re.IGNORECASE,
)
_KEY: Final = re.compile(
    r"api[ _-]?key|unauthori[sz]ed|authenticat|credential|invalid token|"
    "no connected db",  # LiteLLM's proxy looks a key up that is not its own
    re.IGNORECASE,
)


def about(refused: Refused) -> About:
    """Whom a refusal concerns, by status, code and words."""
    status, code, said = refused.status, refused.code.lower(), refused.said
    if status in THROTTLED:
        if code in QUOTA_CODES or (_NO_BALANCE.search(said) and not _passes(refused)):
            return "account"
        # One request above a limit by the minute never passes; the others may.
        return "too long" if re.search("request too large|must be reduced", said, re.I) else "pace"
    if status == 402 or code in QUOTA_CODES:
        return "account"
    if status in (408, 409, 425) or status >= 500:
        return "trouble"
    if code in FILTER_CODES or (status in (400, 403, 422, 451) and _FILTERED.search(said)):
        return "filter"
    if code in TOO_LONG_CODES or (status in (400, 413, 422) and _TOO_LONG.search(said)):
        return "too long"
    if status in (401, 403, 407) or (_NO_BALANCE.search(said) and status == 400):
        return "account"
    if is_of_key(refused):
        return "account"
    if status in (404, 405, 410) or _UNKNOWN_MODEL.search(said):
        return "endpoint"
    return "request" if status >= 400 else "endpoint"


def is_of_key(refused: Refused) -> bool:
    """Whether it is the key that a server does not take."""
    if _NO_BALANCE.search(refused.said):
        return False
    return refused.status in (401, 403, 407) or (
        refused.status == 400 and bool(_KEY.search(refused.said))
    )


def _passes(refused: Refused) -> bool:
    """Whether the server itself says that waiting helps."""
    return refused.retry_after_s is not None or _PASSES.search(refused.said) is not None


def refused_in_batch(name: str, refused: Refused) -> BatchResult:
    """What became of a request of a batch that was answered with an error."""
    if about(refused) == "filter":
        return BatchResult(name, error=refused.message, refused=True)
    return BatchResult(name, error=f"in a batch: {refused.message}")


def same_words(refused: Refused) -> str:
    """A refusal without its figures, by which two can be told to say the same."""
    return f"{refused.status} {re.sub(r'[0-9]+', '#', refused.message)}"
