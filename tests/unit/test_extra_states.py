"""Which of Megatron's requests to a checkpoint are taken back."""

from megatron.core.dist_checkpointing.mapping import ShardedObject

from megaqwen.training.extra_states import drop_absent


def extra(key: str) -> ShardedObject:
    return ShardedObject(key, None, (1,), (0,))


def test_only_extra_states_that_were_not_saved_are_dropped() -> None:
    request = {
        "model": {
            "norm._extra_state": extra("decoder.norm._extra_state"),
            "qkv._extra_state": extra("decoder.qkv._extra_state"),
            "router.state": extra("decoder.router.state"),
            "weight": "a tensor that is not there either",
        },
        "rng_state": extra("rng_state"),
    }
    drop_absent(request, {"decoder.qkv._extra_state"})
    assert list(request["model"]) == ["qkv._extra_state", "router.state", "weight"]
    assert "rng_state" in request
