"""The engine rank's memory for weights that arrive.

An engine rank learns what it needs from vLLM's own loaders (`vllm_plugin.recorder`) and publishes a
`SlotTable`: where in that memory each rectangle of a Hugging Face tensor goes. Trainer ranks answer
with their `Delivery`s, and with every push send the bytes of each and a checksum. Nothing here
depends on a transport, a model or a parallel layout."""
