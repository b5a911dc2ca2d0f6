from __future__ import annotations

from typing import Any

import pytest

from nvila.components.tracking.flatten import metrics, parameters
from nvila.components.tracking.redact import HIDDEN, redact, redact_text, tell


@pytest.mark.parametrize("key", ["token", "hf_token", "apiKey", "api_key", "API-KEY", "apikey", "password", "db.passwd",
                                 "client_secret", "aws_secret_access_key", "private_key", "credentials"])  # fmt: skip
def test_secret_keys_are_hidden(key: str) -> None:
    """Each is a name under which somebody keeps a secret."""
    assert redact({"a": {key: "hunter2"}}) == {"a": {key: HIDDEN}}


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", 8), ("max_length_tokens", 8192), ("tokenizer", "qwen"), ("key", "value"), ("secretary", "Jo"),
     ("token", None), ("monkey", 1), ("keep_ratio", 0.5)],
)  # fmt: skip
def test_ordinary_settings_stay_readable(key: str, value: Any) -> None:
    """Hiding `max_length_tokens` would make runs impossible to compare."""
    assert redact({key: value}) == {key: value}


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("postgresql+psycopg2://me:hunter2@host:5432/db", "@host:5432/db", "hunter2"),
        ("https://ghp_hunter2@host/x", "@host/x", "hunter2"),
        ("https://me:p@ss-hunter2@host/x", "host/x", "hunter2"),
        ("https://host/x?X-Amz-Signature=hunter2&part=3", "part=3", "hunter2"),
        ("Authorization: Bearer hunter2hunter2", "Authorization", "hunter2"),
        ("login failed: password=hunter2, host=db", "host=db", "hunter2"),
        ('{"api_key": "hunter2", "n": 1}', '"n": 1', "hunter2"),
    ],
)
def test_secrets_inside_text_are_hidden(text: str, kept: str, gone: str) -> None:
    """Error messages quote URLs and headers."""
    assert gone not in redact_text(text)
    assert kept in redact_text(text)


@pytest.mark.parametrize("text", ["hf://Qwen/Qwen2-1.5B@8faed761d45a", "hf://gpt2@main", "s3://bucket/key",
                                  "a@b.example", "max_length_tokens: 8192", "accuracy 0.31 is below 0.4"])  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    """A revision is not a password."""
    assert redact_text(text) == text


S = "x7Qd9fK2mZ4pLw8RtB1vN6yH3cJ5gS0aE"  # 33 characters that mean nothing
TOKENS = [
    f"hf_{S}", "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH", f"sk-{S}", f"sk-proj-{S}_{S}", f"sk-ant-api03-{S}-AA",
    f"sk-or-v1-{'0a' * 20}", f"gsk_{S}", f"nvapi-{S}", f"ghp_{S}", f"gho_{S}", f"ghs_{S}", f"github_pat_11AB_{S}",
    f"glpat-{S[:20]}", f"glrt-{S[:20]}", "AKIAIOSFODNN7EXAMPLE", "ASIAY34FZKBOKMUTVV7A", f"AIza{S}ab", f"ya29.a0{S}",
    f"GOCSPX-{S}", "xoxb-123456789012-1234567890123-abcdEFGH", "xoxp-12345678901-abc", f"xapp-1-A1-{S}", f"npm_{S}",
    f"pypi-AgEIcHlwaS5vcmc{S}", f"dckr_pat_{S}", f"hvs.{S}", f"SG.{S[:22]}.{S}", f"dop_v1_{'0a' * 32}", f"sk_live_{S}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{S}", f"eyJhbGciOiJSU0EifQ.{S}.{S}.{S}.{S}", f"wandb_v1_{S}",
    f"123456789:AA{S}", f"shpat_{'0a' * 16}", f"glsa_{S}_01234567", f"lin_api_{S}", f"figd_{S}", f"pcsk_{S}",
    f"lsv2_pt_{S}", f"dp.pt.{S}", f"NRAK-{S[:27].upper()}", f"HRKU-AA{S}", f"LTAI5t{S[:18]}", f"sq0csp-{S}",
    f"1//0g{S}", f"SK{'0a' * 16}", f"key-{'0a' * 16}", f"sbp_{'0a' * 20}", f"ATATT3xFf{S}", f"fw_{S}",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "around", ["{}", "cannot load with {}: 401", '{{"note": "{}"}}', "x={},y", "https://h/{}/x", "'{}'."]
)
def test_tokens_are_known_by_their_form(token: str, around: str) -> None:
    """An error quotes a token with no name beside it."""
    text = redact_text(around.format(token))
    assert token not in text and HIDDEN in text
    assert S not in text and redact({"note": [around.format(token)]}) == {"note": [text]}


PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow{}\nAQAB\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"aws_secret_access_key = {S}/+{S[:6]}", f"export AWS_SECRET_ACCESS_KEY='{S}'", f"WANDB_API_KEY={'0a' * 20}",
        f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={S}==;EndpointSuffix=core.windows.net",
        f"Endpoint=sb://n.servicebus.windows.net/;SharedAccessKeyName=k;SharedAccessKey={S}=",
        f"Server=h;User Id=sa;Password={S};Encrypt=yes", f"Server=h;UID=sa;Pwd={S}",
        f"host=db user=me password='{S} {S}'",
        f"https://a.blob.core.windows.net/c?sv=2024&sr=b&sig={S}%3D&se=2027", f"https://h/p?token={S}",
        f"/p?a=1&api_key={S}",
        f"https://h/p?access_token={S}#x", f"https://h/cb#access_token={S}", f"https://h/p?key={S}",
        f"https://s3/x?X-Amz-Credential=A&X-Amz-Security-Token={S}", f"https://s3/x?X-Amz-Signature={S}",
        f"https://storage.googleapis.com/b?X-Goog-Signature={S}",
        f"https://s3/b?AWSAccessKeyId=A&Signature={S}&Expires=1",
        f"Authorization: Bearer {S}", f"authorization: Basic {S}", f"Proxy-Authorization: Basic {S}=", f"bearer {S}",
        f"{{'Authorization': 'Bearer {S}'}}", f"Authorization: token {S}", f"Authorization: {S}",
        f"Cookie: a=1; session={S}",
        f"Authorization: AWS4-HMAC-SHA256 Credential=A/x, SignedHeaders=host, Signature={S}",
        f"https://me:{S}@host/x", f"postgresql://me:{S[:9]}/{S[9:]}@host/db", f"redis://:{S}@host:6379/0",
        f"ssh://{S}@h/x",
        f"mongodb+srv://me:{S}@h/?retryWrites=true", f"git+https://{S}@github.com/a/b.git", f"https://u:p@{S}@h/x",
        PEM.format(S), PEM.format(S).replace("\n", "\\n"), PEM.format(S)[:60], f"machine h login me password {S}",
        f'{{\"body\": \"{{\\\"password\\\": \\\"{S}\\\"}}\"}}', f"tool --token {S} --n 3", f"tool --api-key={S}",
        f"--password {S}",
        f"failed: password: {S}", f'password="{S}', f"client_secret: {S}", f"dsn={S}", f"PGPASSWORD={S}",
        f"authToken: {S}",
        f"https://hooks.slack.com/services/T0/B0/{S}", f"https://discord.com/api/webhooks/1/{S}", f"apikey => {S}",
        f"{{b'password': b'{S}'}}", f"password%3D{S}", f"https://h/?q=a%26token%3D{S}", f"password := {S}",
        f"password: |\n  {S}\n", f"HF_TOKEN:\n    {S}\nN: 3", f"secrets:\n  - {S}\n",
        f'{{"passwords": ["{S}", "{S}"]}}',
        f"- name: HF_TOKEN\n  value: {S}", f'{{"name":"HF_TOKEN","value":"{S}"}}', f"('x-api-key', '{S}')",
        f"<password>{S}</password>", f"curl -u me:{S} https://h", f"the password is {S}", f"passwd {S}",
        f'{{"auths": {{"r": {{"auth": "{S}=="}}}}}}', f"Authorization: SSWS {S}", f"pass\x1b[31mword={S}",
        f"password={S[:9]}\x1b[0m{S[9:]}", f'"{{\\"n\\": \\"{{\\\\\\"password\\\\\\": \\\\\\"{S}\\\\\\"}}\\"}}"',
        f'{{\\"password\\": \\"ab\\\\\\"{S}\\"}}', f"PuTTY-User-Key-File-2: ssh-rsa\nPrivate-Lines: 14\n{S}",
        f"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n{S}",
        f"password={S[:4]},{S[4:]}", f"passwd: {S}&{S}", f"token={S}", f'token: "{S} {S}"', f"MY_CREDENTIALS={S}",
    ],
)  # fmt: skip
def test_secrets_are_known_by_what_stands_beside_them(text: str) -> None:
    """Each is how a server, a driver or a shell shows one in an error message; half a secret is one too."""
    shown = redact_text(text)
    assert all(S[i : i + 6] not in shown for i in range(0, 28, 3)), shown
    assert "0a0a0a" not in shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "a" * 64, "sha256:" + "0a" * 32, f"commit {'0a' * 20}", f"digest={'0a' * 32}",
        "key: 0123456789abcdef0123456789abcdef",
        "token count 12", "token: 151649", "image_token_id: 151649", "image_token_id=151649", "max_new_tokens: 64",
        "max_new_tokens=64", "num_time_tokens: 100", "soft_tokens=4", "soft_tokens: true", "eos_token: <|im_end|>",
        "time_token_format: <t{t}>", "tokens: 1,234 of 5,000", "64 tokens a second", "image_token=<image>",
        "--max-new-tokens 64",
        "oci://registry/image@sha256:" + "0a" * 32, "docker://image:tag@sha256:" + "0a" * 32, "http://[::1]:8080/a@b",
        "https://host:8443/a@b", "git@github.com:a/b.git", "https://h/p?page=2&key=a", "s3://bucket/passwords.csv",
        "the secretary signs in", "basic training settings", "a bearer certificate", "password is wrong",
        "authorization failed", "hf_hub_download",
        "hf_transfer is not installed",
        "sk-learn-compatible-estimators", "npm_config_registry", "passed: 12", "bypass=3", "monkey: banana",
        "keyboard=qwerty",
        "accuracy 0.31 is below 0.4 (95% from 0.28)", "steps/train-1.json", "secret: none",
        "pypi-simple-repository-of-packages",
        "model: models:/nvila-tiny/3", "tokenizer: Qwen/Qwen2-1.5B", "digits: exact match 0.100",
        "2026-11-23T10:00:00+00:00", "expected_token: 'cat'", "next_token=7", "docker run -u 1000:1000 x", "auth: tls",
        "columns: ['token', 'password', 'answer']", "password:\n  - at least eight characters", "\x1b[31mred\x1b[0m",
    ],
)  # fmt: skip
def test_ordinary_words_and_digests_stay(text: str) -> None:
    """Lineage is made of digests, and a message without its numbers helps nobody."""
    assert redact_text(text) == text


@pytest.mark.parametrize("key", ["AWSSecretAccessKey", "AccountKey", "connection_string", "database.dsn", "webhook_url",
                                 "PGPASSWORD", "authtoken", "secret_key", "DB_PASS", "access_token",
                                 "SharedAccessSignature",
                                 "refreshToken", "credential", "wandb_api_key", "APIKey", "passwords.0",
                                 "pwd"])  # fmt: skip
def test_names_of_secrets_are_known_however_they_are_written(key: str) -> None:
    """Every tool has its own spelling."""
    key = key.replace("passwords", "password")
    assert redact({key: "hunter2", "n": [{key: 5}]}) == {key: HIDDEN, "n": [{key: HIDDEN}]}


@pytest.mark.parametrize(("key", "value"), [
    ("image_token_id", 151649), ("num_time_tokens", 100), ("soft_tokens", True), ("eos_token", "<|im_end|>"),
    ("media_tokens", {"image": "<image>"}), ("token_type_ids", [0, 1]), ("time_token_format", "<t>"),
    ("stop_tokens", ["</s>"]),
    ("max_new_tokens", "64"), ("tokens_per_second", 3.5), ("use_token", True), ("num_image_tokens", 256),
    ("primary_key", "id"),
    ("sha256", "0a" * 32), ("key", "0a" * 32),
])  # fmt: skip
def test_settings_of_language_models_stay(key: str, value: Any) -> None:
    """Two runs cannot be compared whose settings are hidden."""
    assert redact({key: value}) == {key: value}


def test_a_variable_of_a_pod_is_hidden_by_its_name() -> None:
    """Kubernetes lists them as name and value."""
    assert redact([{"name": "DB_PASSWORD", "value": "x"}, {"name": "N", "value": "3"}]) == [
        {"name": "DB_PASSWORD", "value": HIDDEN},
        {"name": "N", "value": "3"},
    ]


def test_secrets_of_the_environment_are_hidden_as_urls_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client quotes a token before it sends it, and an error shows the address."""
    monkeypatch.setenv("NVILA_API_KEY", "a/b+c d=e")
    monkeypatch.setenv("PWD", "/home/somebody")
    shown = redact_text("GET /x/a%2Fb%2Bc%20d%3De failed, a/b+c d=e, in /home/somebody")
    assert shown == f"GET /x/{HIDDEN} failed, {HIDDEN}, in /home/somebody"


def test_what_is_told_steers_no_terminal() -> None:
    """A log is read in a terminal."""
    assert tell(f"\x1b[2Jpassword={S}\nnext\tline") == f"\\x1b[2Jpassword={HIDDEN}\nnext\tline"


def test_parameters_are_flat_and_of_legal_names() -> None:
    """MLflow refuses other characters and would drop the whole batch."""
    assert parameters({"a": [1, 2], "b": [{"c": "x"}, {"c": None}], "d?": True}) == {
        "a": "[1, 2]",
        "b.0.c": "x",
        "b.1.c": "null",
        "d_": "true",
    }


def test_metrics_are_numbers_only() -> None:
    """A flag logged as 1.0 would be drawn as a curve."""
    assert metrics({"a": {"b": 1, "c": True, "d": "x", "e": [1, 2]}, "f": 0.5}) == {"a/b": 1.0, "f": 0.5}
