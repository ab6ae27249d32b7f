"""A `torch.compile` on the CPU with the manners of CUDA graphs, for machines that have no GPU.

A CUDA graph replays kernels on the memory they were recorded on. So here, as there, weights and buffers must
stay where they are, images and labels are copied in, and what a pass returned is overwritten by the next one.
"""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

real_compile = torch.compile


class Replay:
    """Stands for `torch.compile` while `run` is trained; what a GPU would not stand raises AssertionError."""

    def __init__(self, poison):
        self.poison, self.run = poison, None
        self.graphs = self.passes = 0
        self.generation, self.of_results, self.results = 0, 0, []

    def compile(self, function, mode, dynamic):
        backend = aot_autograd(
            fw_compiler=self.forward, bw_compiler=self.backward, keep_inference_input_mutations=True
        )
        compiled = real_compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

        def call(*args):
            self.generation += 1
            return compiled(*args)

        return call

    def forward(self, graph, inputs):
        self.graphs += 1
        about = TracingContext.get().fw_metadata
        static, mutated = set(about.static_input_indices), set(about.mutated_inp_runtime_indices)
        fresh = [value for index, value in enumerate(inputs) if index not in static]
        assert mutated <= static, "a mutated input is copied: its mutation is lost"
        assert [value.dim() for value in fresh] in ([4], [4, 1], [1, 4]), (
            "more than images and labels is copied"
        )
        addresses = {}

        def replay(args):
            if self.of_results != self.generation:
                self.overwrite()
            for index in static:
                assert addresses.setdefault(index, args[index].data_ptr()) == args[index].data_ptr(), "moved"
            copies = [value if index in static else value.clone() for index, value in enumerate(args)]
            return self.keep(graph(*copies), copies)

        return boxed(replay)

    def backward(self, graph, inputs):
        return boxed(lambda args: self.keep(graph(*args), args))

    def overwrite(self):
        """Begin a pass: what the one before returned is gone, and nobody may hold a gradient."""
        self.passes, self.of_results = self.passes + 1, self.generation
        weights = [weight for group in self.run.optimizer.param_groups for weight in group["params"]]
        assert all(weight.grad is None for weight in weights), "a gradient lies in memory of the next pass"
        for result in self.results if self.poison else ():
            result.fill_(torch.nan if result.is_floating_point() else 1)
        self.results.clear()

    def keep(self, results, inputs):
        """Remember the results of a pass that have memory of their own."""
        memory = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, torch.Tensor)}
        for result in results:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in memory:
                self.results.append(result.detach())
        return results


def boxed(function):
    """`function(list)` as AOTAutograd calls it: with the only reference to its arguments."""

    def call(args):
        values = list(args)
        args.clear()
        return function(values)

    call._boxed_call = True
    return call
