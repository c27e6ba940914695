"""Speaks the lines of agents/verifiers/serve.py, and does what a task says."""

import json
import sys
import urllib.request

options = json.loads(sys.argv[1])
if options["environment"]["taskset"]["id"] == "missing":
    sys.exit("ModuleNotFoundError: No module named 'missing'")
if options.get("list"):
    for number in range(4):
        print(json.dumps({"prompt": f"What is {number}?", "does": "well"}))
    sys.exit()
print(json.dumps({"id": "", "ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "cancel" in job:
        continue
    does = job["task"]["does"]
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 9}}
    request = urllib.request.Request(
        job["base_url"] + "/inference/v1/generate",
        json.dumps(body).encode(),
        {"X-R1-Session": job["key"]},
    )
    with urllib.request.urlopen(request) as reply:
        ids = json.load(reply)["choices"][0]["token_ids"]
    if does == "die":
        sys.exit("a bug")
    reply = {"id": job["id"], "ok": does != "fail", "reward": 0.5, "traces": 1, "errors": []}
    reply["sequences"] = [[5, 6, *ids], []] if does == "well" else [[5, 6, *ids[:-1]]]
    if does == "fail":
        reply |= {"reward": 0.0, "errors": ["ToolError: no tool"]}
    print(json.dumps(reply), flush=True)
