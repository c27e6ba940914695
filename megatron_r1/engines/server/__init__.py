"""One rollout engine: a vLLM server in processes of its own, driven over HTTP.

Imports neither torch nor vllm."""
