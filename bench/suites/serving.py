# SPDX-License-Identifier: Apache-2.0
"""Suite `serving`: a whole model of random weights, a batch whose requests have adapters of their own.

    base      the model alone
    peft      stock PEFT with adapter_names=; of one adapter its own way
    patched   PEFT's model after lrkern.peft.patch, of one adapter
    merged    PEFT's merge_and_unload, of one adapter
    followed  lrkern.serving where every forward is followed to see whose rows are whose, as a model with code of its own is
    lrkern    lrkern.serving, which knows the rows of forwards of these shapes from the first one

method: encoder, MiniLM's shape on T tokens as A requests; decode, a step of a small Llama: one token each of A requests.
"""

import copy
from typing import Any

import peft
import suite
import torch
import transformers
from suite import Call, Case

import lrkern.peft
from lrkern import reference
from lrkern.serving import AdapterPool, MultiLoraModel

MODELS = {
    "encoder": lambda: transformers.BertModel(
        transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    ),
    "decode": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8, vocab_size=4096
        )
    ),
}
RANK = 16


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        draw = reference.Draw(device, case.dtype, seed)
        torch.manual_seed(seed)
        self.model = MODELS[case.method]().to(device, case.dtype).eval()
        self.names = [f"a{i}" for i in range(case.A)]
        with torch.device(device):
            stock = MODELS[case.method]().to(device, case.dtype)
        stock.load_state_dict(self.model.state_dict())
        config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        self.stock = peft.get_peft_model(stock, config, self.names[0])
        for name in self.names[1:]:
            self.stock.add_adapter(name, config)
        self.stock.eval()
        pool = AdapterPool(self.model, pages=case.A)
        for name in self.names:
            pool.add(name, config, peft.get_peft_model_state_dict(self.stock, adapter_name=name))
        self.served = MultiLoraModel(self.model, pool)
        if case.A == 1:
            self.patched, self.merged = copy.deepcopy(self.stock), copy.deepcopy(self.stock).merge_and_unload()
            lrkern.peft.patch(self.patched)
        x = draw(case.A, case.T // case.A, self.model.config.hidden_size)
        super().__init__({"x": x})
        self.kwargs: dict[str, Any] = (
            dict(inputs_embeds=x, use_cache=False) if case.method == "decode" else dict(inputs_embeds=x)
        )


class Suite(suite.Suite):
    against = "base"
    cold = False
    data = Data

    def cases(self, quick: bool) -> list[Case]:
        case = lambda method, T, A: Case(method=method, A=A, T=T, passes="no_grad", dtype=torch.float32)
        cases = [case("encoder", 512, 16), case("decode", 8, 8)]
        return cases if quick else [*cases, case("encoder", 64, 4), case("decode", 2, 2), case("decode", 1, 1)]

    def base(self, d: Data) -> Call:
        def run():
            with d.served.base() as model:
                return model(**d.kwargs).last_hidden_state

        return Call(run)

    def peft(self, d: Data) -> Call:
        names = {"adapter_names": d.names} if len(d.names) > 1 else {}
        return Call(lambda: d.stock(**d.kwargs, **names).last_hidden_state)

    def patched(self, d: Data) -> Call | None:
        return Call(lambda: d.patched(**d.kwargs).last_hidden_state) if len(d.names) == 1 else None

    def merged(self, d: Data) -> Call | None:
        return Call(lambda: d.merged(**d.kwargs).last_hidden_state) if len(d.names) == 1 else None

    def followed(self, d: Data) -> Call:
        def run():
            d.served._paths.found.clear()
            return d.served(**d.kwargs, adapters=d.names).last_hidden_state

        return Call(run)

    def lrkern(self, d: Data) -> Call:
        return Call(lambda: d.served(**d.kwargs, adapters=d.names).last_hidden_state)
