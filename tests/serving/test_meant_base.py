# SPDX-License-Identifier: Apache-2.0
"""The base answers in place of an adapter only where that is meant."""

import threading

import pytest
import torch
from test_rows import DECODER, Case, Moving
from tiny_models import V, tiny


def hold(case, **inputs):
    """A call with adapters that waits in the model, in a thread of its own, and what lets it go on."""
    inside, go_on, errors = threading.Event(), threading.Event(), []
    layer = case.model.get_submodule(case.pool.layers[0])
    me = []

    def wait(*_):
        if threading.get_ident() in me:
            inside.set()
            go_on.wait(60)

    def run():
        me.append(threading.get_ident())
        try:
            case.served(**inputs, adapters=["a", "b"])
        except BaseException as error:
            errors.append(error)

    handle, thread = layer.register_forward_pre_hook(wait), threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)

    def end():
        go_on.set()
        thread.join(60)
        handle.remove()
        assert not errors, errors

    return end


def test_a_forward_of_another_thread_has_to_mean_the_base():
    case = Case(tiny("llama"), DECODER)
    ids = torch.randint(3, V, (2, 3))
    with torch.no_grad():
        want = case.model(ids).logits
    end = hold(case, input_ids=ids)
    try:
        with pytest.raises(RuntimeError, match=r"served\.base\(\)"):
            case.model(ids)
        with case.served.base() as model, torch.no_grad():
            assert torch.equal(model(ids).logits, want)
        assert torch.equal(case.served(ids).logits, want)
        assert torch.equal(case.served(ids, adapters=[None, "__base__"]).logits, want)
    finally:
        end()
    with torch.no_grad():
        assert torch.equal(case.model(ids).logits, want), "no call runs"


def test_a_worker_thread_inside_the_model_is_refused():
    class Threaded(Moving):
        def moved(self, h, ids):
            results = []

            def run():
                try:
                    results.append(self.linear(h))
                except RuntimeError as error:
                    results.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if isinstance(results[0], Exception):
                raise results[0]
            return results[0]

    case = Case(Threaded().eval(), ["linear"])
    with pytest.raises(RuntimeError, match=r"served\.base\(\)"):
        case.served(ids=torch.ones(2, 1, dtype=torch.int64), adapters=["a", "a"])


def test_words():
    """PEFT's, misspelt ones, and settings of generate by position."""
    from transformers import GenerationConfig

    case = Case(tiny("llama"), DECODER)
    ids = torch.randint(3, V, (2, 3))
    want = case.served(ids, adapters=["a", None]).logits
    assert torch.equal(case.served(ids, adapter_names=["a", "__base__"]).logits, want)
    assert torch.equal(case.served(input_ids=ids, adapters=["a", []], output_attentions=False).logits, want)
    for wrong in ("adaptors", "adapter", "scale", "adapter_name"):
        with pytest.raises(TypeError, match=f"no argument '{wrong}'"):
            case.served(ids, **{wrong: ["a", None]})
        with pytest.raises((TypeError, ValueError), match=wrong):
            case.served.generate(ids, **{wrong: ["a", None]})
    with pytest.raises(ValueError, match="adapters must be given once"):
        case.served(ids, adapters=["a", None], adapter_names=["a", None])
    with pytest.raises(ValueError, match="cache_implementation must be one that this thread runs, got 'paged'"):
        case.served.generate(ids, adapters=["a", None], cache_implementation="paged")
    config = GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    got = case.served.generate(ids, config, adapter_names=["a", "__base__"])
    assert torch.equal(got[:2], case.alone["a"].generate(ids[:1], config))
    assert torch.equal(got[2:], case.alone[None].generate(ids[1:], config))
    with pytest.raises(ValueError, match="got 'paged'"):
        case.served.generate(ids, GenerationConfig(cache_implementation="paged"), adapters=["a", None])
