"""Threads and asyncio tasks that share a model: what one does in a context of the model does not reach another."""

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dipnet_hf import dip_loss
from dipnet_hf.contexts import ContextValue, PerThread
from tests.helpers import calibrated_model, checkpointed, dip_model, gradients
from tests.tiny_models import make_batch

SITES = {
    "all layers": {},
    "upper layers": {"layers_to_transform": [1, 2]},
    "embedding": {"target_sites": "embedding"},
}


def in_threads(functions):
    """Call the functions at once, each in a thread of its own, and return what they return."""
    together = threading.Barrier(len(functions))

    def call(function):
        together.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(call, functions))


def requests(model, batch):
    """Eight different requests: ensembles, single samples and plain ones, that generate and run forward by turns."""
    contexts = [
        lambda: model.ensemble(3),
        contextlib.nullcontext,
        lambda: model.ensemble(2, average="logit", seed=1),
        model.deterministic,
        lambda: model.sampling(seed=5),
        contextlib.nullcontext,
        lambda: model.ensemble(4, seed=2),
        lambda: model.sampling(seed=6),
    ]

    def request(number, context):
        def answer():
            answers = []
            for turn, length in enumerate((4, 7, 3)):
                ids = batch["input_ids"][number % 4 :, :length]
                with torch.no_grad(), context():
                    if (number + turn) % 2:
                        answers.append(model(input_ids=ids).logits)
                    else:
                        answers.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
            return answers

        return answer

    return [request(number, context) for number, context in enumerate(contexts)]


@pytest.mark.parametrize("sites", SITES)
def test_eight_threads_answer_as_one_after_another(sites, batch):
    model = calibrated_model(weights="frozen", init_noise_std=0.5, **SITES[sites])
    functions = requests(model, batch)
    expected = [function() for function in functions]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    for _ in range(2):
        for answers, right in zip(in_threads(functions), expected, strict=True):
            assert all(map(torch.equal, answers, right))
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def test_losses_in_threads_capture_their_own_hidden_states(batch):
    model = calibrated_model(weights="frozen", init_noise_std=0.5, num_samples=2, layers_to_transform=[1, 2])

    def loss(seed):
        with torch.no_grad(), model.sampling(seed):
            return [dip_loss(model, make_batch("llama", num_rows=4)).loss for _ in range(3)]

    functions = [lambda seed=seed: loss(seed) for seed in range(4)]
    plain = [lambda: [model(**batch).logits for _ in range(6)] for _ in range(4)]
    expected = [function() for function in functions + plain]
    for answers, right in zip(in_threads(functions + plain), expected, strict=True):
        assert all(map(torch.equal, answers, right))


def test_a_thread_that_is_started_in_a_context_has_it_only_by_a_copy(batch):
    model = calibrated_model(weights="frozen", init_noise_std=0.5)
    ids = batch["input_ids"][:, :5]

    @torch.no_grad()
    def answer():
        return model(input_ids=ids).logits

    async def two_tasks():
        async def noisy():
            with model.ensemble(2):
                await asyncio.sleep(0)  # the other task enters its own context meanwhile
                return await asyncio.to_thread(answer)

        async def quiet():
            with model.deterministic():
                await asyncio.sleep(0)
                return answer()

        return await asyncio.gather(noisy(), quiet())

    plain = answer()
    with model.ensemble(2):
        expected = answer()
        assert torch.equal(in_threads([answer])[0], plain)
        context = contextvars.copy_context()
        assert torch.equal(in_threads([lambda: context.run(answer)])[0], expected)
    noisy, quiet = asyncio.run(two_tasks())
    assert torch.equal(noisy, expected) and torch.equal(quiet, plain)


def test_a_generator_may_end_in_another_context_than_it_began_in(batch):
    """A web server calls `next` of a streamed answer in a copied context each time."""
    model = calibrated_model(weights="frozen", init_noise_std=0.5)

    def stream():
        with model.ensemble(2):
            yield 1

    stream = stream()
    assert contextvars.copy_context().run(next, stream) == 1
    assert contextvars.copy_context().run(next, stream, "end") == "end"
    with torch.no_grad():
        plain = model(**batch).logits
        with model.deterministic():
            assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_backward_pass_of_another_thread_recomputes_the_same_noise(batch, use_reentrant):
    results = []
    for prepare in (lambda model: model, lambda model: checkpointed(model, dict(use_reentrant=use_reentrant))):
        model = prepare(dip_model("llama", [batch], num_samples=2).train())
        torch.manual_seed(0)
        (loss,) = in_threads([lambda model=model: dip_loss(model, batch).loss])
        with torch.no_grad():  # numbers no nodes
            in_threads([lambda model=model: model(**batch)])
            model(**batch)
        results.append(gradients(model, loss))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_recomputing_what_one_of_several_threads_ran_is_refused(batch):
    model = checkpointed(dip_model("llama", [batch], target_sites="attention").train(), dict(use_reentrant=False))
    (loss, _) = in_threads([lambda: dip_loss(model, batch).loss, lambda: model(**batch)])
    with pytest.raises(RuntimeError, match=r"several threads ran forward passes .* under torch.no_grad\(\)"):
        loss.backward()


def test_a_copy_of_a_model_is_in_no_context(batch):
    model = calibrated_model(num_samples=2, layers_to_transform=[1, 2])
    plain = model(**batch).logits  # with gradients: it is remembered for a backward pass
    with model.ensemble(2):
        model(**batch)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, plain) and not torch.equal(model(**batch).logits, plain)
    with twin.ensemble(2):
        assert torch.equal(model(**batch).logits, plain) and not torch.equal(twin(**batch).logits, plain)


def test_values_nest_and_a_copy_of_their_owner_is_in_no_block():
    value, other = ContextValue("default"), ContextValue(0)
    with value.set_to("outer"), other.set_to(1):
        with value.set_to("inner"):
            assert (value.get(), other.get()) == ("inner", 1)
            assert copy.deepcopy(value).get() == pickle.loads(pickle.dumps(value)).get() == "default"
        assert value.get() == "outer"
    first, second = value.set_to("first"), other.set_to(2)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)  # not in the order of a stack
    assert (value.get(), other.get()) == ("default", 2)
    second.__exit__(None, None, None)
    assert other.get() == 0


class Counter(PerThread):
    def __init__(self):
        self.number = 0


def test_every_thread_has_its_own_attributes():
    counter = Counter()
    counter.number = 1
    assert in_threads([lambda: counter.number]) == [0]
    assert copy.deepcopy(counter).number == 0 and counter.number == 1


def test_blocks_that_end_in_any_order_leave_no_value_to_compiled_passes():
    value = ContextValue("outside")
    first, second = value.set_to("first"), value.set_to("second")

    def enter_in_a_thread_of_its_own(block):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(block.__enter__).result()

    enter_in_a_thread_of_its_own(first)
    enter_in_a_thread_of_its_own(second)
    assert value._latest == "second"
    first.__exit__(None, None, None)
    assert value._latest == "second"
    second.__exit__(None, None, None)
    assert value._latest == "outside" and value.get() == "outside"
