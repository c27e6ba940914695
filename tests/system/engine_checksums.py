"""vLLM's own checksums of the tensors that an engine computes with."""

import msgspec


async def checksums(fleet, engine=0):
    """Return tensor → checksum of all tensors that an engine computes with."""
    answer = await fleet.engines[engine].client.request(
        "POST", "/weight_checker", {"action": "checksum"}
    )
    found = msgspec.json.decode(answer)["checksums"]
    assert len(found) > 10
    return found
