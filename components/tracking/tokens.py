"""What credentials look like by themselves, whatever stands beside them: the marks that their issuers give them."""

from __future__ import annotations

import re

_MIXED = r"(?=[\w-]{0,99}[0-9A-Z])"
"""A token of several words has a digit or a capital: `sk-learn-like-package-names` do not."""

_FORMS = (
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}",  # Hugging Face
    rf"sk-(?:[A-Za-z0-9]{{20,}}|{_MIXED}[\w-]{{16,}})",  # OpenAI, Anthropic, OpenRouter
    rf"pa-{_MIXED}[\w-]{{40,}}",  # Voyage
    r"(?:fw_|cio)[A-Za-z0-9]{24,}",  # Fireworks, crates.io
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
    r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,}",  # Discord
    r"sh(?:pat|pss|pca|ppa)_[0-9a-f]{32}",  # Shopify
    r"sq0(?:atp|csp)-[\w-]{20,}",  # Square
    r"(?:EZAK|EZTK)[A-Za-z0-9]{50,}",  # EasyPost
    r"gl(?:sa|c)_[\w+/=-]{30,}",  # Grafana
    r"(?:lin_api|ntn|figd|ph[xc]|pcsk|tfp|KGAT|napi|vcp|lsv2_(?:pt|sk)|pscale_(?:tkn|pw|oauth))_[\w.-]{24,}",
    r"(?:sntrys|ops)_eyJ[\w+/=-]{16,}",  # Sentry, 1Password
    r"secret_[A-Za-z0-9]{43}",  # Notion
    r"(?:sbp|rubygems)_[0-9a-f]{40,}",
    r"pul-[0-9a-f]{40}",
    r"dp\.(?:pt|st|ct|sa|scim|audit)\.[\w.-]{30,}",  # Doppler
    r"NRAK-[A-Z0-9]{20,}",  # New Relic
    r"HRKU-[\w-]{30,}",  # Heroku
    r"(?:FlyV1 )?fm[12]r?_[A-Za-z0-9+/=,_]{20,}|fo1_[\w-]{40,}",  # Fly
    r"xkeysib-[0-9a-f]{64}-\w{16}",  # Brevo
    r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",  # Airtable
    r"dt0[cs]\d\d\.[A-Z0-9]{20,}\.[A-Z0-9]{40,}",  # Dynatrace
    r"AT(?:ATT3|CTT3|BB)[\w=-]{24,}",  # Atlassian
    r"AKCp[A-Za-z0-9]{60,}|cmVmdGtuOj[A-Za-z0-9]{40,}",  # Artifactory
    r"ABSK[A-Za-z0-9+/]{60,}=*",  # Bedrock
    r"amzn\.mws\.[0-9a-f-]{36}",
    r"(?:LTAI|AKID)[A-Za-z0-9]{16,32}",  # Alibaba, Tencent
    r"AQVN[\w-]{30,}",  # Yandex
    r"1//0[\w-]{30,}",  # Google: refresh token
    r"(?:SK|key-)[0-9a-f]{32}",  # Twilio, Mailgun
    r"[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}",  # Terraform
    r"[\w~.-]{3}\dQ~[\w~.-]{31,34}",  # Entra
    r"v1\.0-[0-9a-f]{24,}-[0-9a-f]{100,}",  # Cloudflare
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_FORMS)})(?![A-Za-z0-9])")
_HOOK = re.compile(
    r"(?P<name>https://(?:hooks\.slack\.com|(?:\w+\.)?discord(?:app)?\.com/api|[\w.-]+\.webhook\.office\.com)/)[^\s\"'<>]+"
)
"""Addresses whose path is all that protects them."""
_PRIVATE_KEY = re.compile(
    r"-{4,5} ?BEGIN (?P<kind>[A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?) ?-{4,5}.*?(?:-{4,5} ?END (?P=kind) ?-{4,5}|\Z)"
    r"|Private-Lines: \d+\s.*?(?:Private-MAC: |\Z)",
    re.DOTALL,
)


def hide_tokens(text: str, hidden: str) -> str:
    """`text` with `hidden` in place of whatever has the form of a token, of a webhook's path, or of a private key."""
    text = _PRIVATE_KEY.sub(
        lambda found: f"-----BEGIN {found['kind']}-----{hidden}" if found["kind"] else f"Private-Lines: {hidden}", text
    )
    return _TOKEN.sub(hidden, _HOOK.sub(rf"\g<name>{hidden}", text))
