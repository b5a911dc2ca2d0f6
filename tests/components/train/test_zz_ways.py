import os

import pytest
from attempts import Attempt
from test_worker import losses, weights

pytestmark = pytest.mark.usefixtures("one_rank")
WAYS = [
    (m, p, z, o, w)
    for m in os.environ["M"].split(",")
    for p in os.environ.get("P", "fp32").split(",")
    for z in map(int, os.environ.get("Z", "0,1,2,3").split(","))
    for o in (["none", "cpu"] if z >= 2 else ["none"])
    for w in map(int, os.environ.get("W", "1,2").split(","))
]


def test_ways(make_job):
    ref = {}
    n = 0
    for m, p, z, o, w in WAYS:
        n += 1
        t = "layernorm" if m == "qlora" else "lora" if m == "lora" else "layernorm"
        meth = {"vision_tower": t} | ({} if m == "layernorm" else {"llm": m})
        job = make_job(
            f"a{n}",
            stage={"methods": meth, "micro_batch": 4}
            | ({} if m == "layernorm" else {"lora": {"rank": 8, "dropout": 0.0}}),
            run={"precision": p, "zero": z, "offload": o, "gpus": w},
        )
        codes = Attempt(job).wait()
        if codes != [0] * w:
            print("FAILED", m, p, z, o, w, codes, flush=True)
            continue
        got = weights(job.out)
        if (m, p) not in ref:
            ref[m, p] = (got, losses(job))
        before = weights(job.model)
        far = sum(float((got[k].float() - ref[m, p][0][k].float()).norm() ** 2) for k in got) ** 0.5
        moved = (
            sum(float((ref[m, p][0][k].float() - before[k].to(got[k].dtype).float()).norm() ** 2) for k in got) ** 0.5
        )
        print(m, p, z, o, w, "apart %.1e" % (far / moved), losses(job)[-1], flush=True)
