"""What credentials look like by themselves, whatever stands beside them: the marks that their issuers give them."""

from __future__ import annotations

import re

_MIXED = r"(?=[\w-]{0,99}[0-9A-Z])"
"""A token of several words has a digit or a capital: `sk-learn-like-package-names` do not."""

_FORMS = (
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}",  # Hugging Face
    rf"sk-(?:[A-Za-z0-9]{{20,}}|{_MIXED}[\w-]{{16,}})",  # OpenAI, Anthropic, OpenRouter
    rf"(?:xai|pplx|nvapi)-{_MIXED}[\w-]{{16,}}",
    r"(?:gsk|r8|tgp_v1)_[\w-]{20,}",  # Groq, Replicate, Together
    r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}",  # Stripe
    r"gh[opusr]_[A-Za-z0-9]{16,}",
    r"github_pat_\w{16,}",
    r"gl(?:pat|ptt|dt|rt|ft|cbt|imt|agent|oas|soat)-[\w.-]{16,}",
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",  # AWS
    r"AIza[\w-]{30,}",  # Google: API key, OAuth client and access token
    r"GOCSPX-[\w-]{16,}",
    r"ya29\.[\w.-]{16,}",
    r"xox[a-z]-[\w.-]{10,}",  # Slack
    r"xapp-[\w-]{10,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*){0,3}",  # JSON web tokens, signed or encrypted
    r"npm_[A-Za-z0-9]{16,}",
    rf"pypi-{_MIXED}[\w-]{{32,}}",
    r"dckr_(?:pat|oat)_[\w-]{16,}",
    r"do[oprt]_v1_[0-9a-f]{16,}",  # DigitalOcean
    r"hv[sbr]\.[\w-]{16,}",  # Vault
    r"dapi[0-9a-f]{32}(?:-\d+)?",  # Databricks
    r"SG\.[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    r"wandb_v\d+_\w{16,}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{20,}",
    r"[0-9]{8,10}:AA[\w-]{32,}",  # Telegram
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_FORMS)})(?![A-Za-z0-9])")
_HOOK = re.compile(
    r"(?P<name>https://(?:hooks\.slack\.com|(?:\w+\.)?discord(?:app)?\.com/api|[\w.-]+\.webhook\.office\.com)/)[^\s\"'<>]+"
)
"""Addresses whose path is all that protects them."""
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END (?P=kind)-----|\Z)", re.DOTALL
)


def hide_tokens(text: str, hidden: str) -> str:
    """`text` with `hidden` in place of whatever has the form of a token, of a webhook's path, or of a private key."""
    text = _PRIVATE_KEY.sub(lambda found: f"-----BEGIN {found['kind']}-----{hidden}", text)
    return _TOKEN.sub(hidden, _HOOK.sub(rf"\g<name>{hidden}", text))
