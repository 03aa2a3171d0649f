"""Runs a command of the package and notes what it encodes and how many parameters are in memory.

usage: watched_run.py FILE ARG...   (writes FILE, a JSON object, when the command has ended)

encodings: how often each question was made into a prompt. live_bytes: the most bytes of arrays
within an update step, by phase. param_bytes: those of the trained parameters.
"""

import collections
import json
import sys


def watch(notes):
    import jax

    from cipo_jax.text.chat_format import ChatFormat
    from cipo_jax.training.step import TrainStep

    encode, call = ChatFormat._encode_apart, TrainStep.__call__

    def counted(self, around, data):
        if around == self._around:
            notes["encodings"][data[0]] += 1
        return encode(self, around, data)

    def weighed(self, state, *args):
        # Of shapes: the state is given up in the step.
        params = sum(x.nbytes for x in jax.tree.leaves(state.params))
        new = call(self, state, *args)
        # By buffer: the shards of an array are arrays of the same one.
        live = sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())
        phase = type(self.objective).__name__
        notes["param_bytes"] = params
        notes["live_bytes"][phase] = max(notes["live_bytes"].get(phase, 0), live)
        return new

    ChatFormat._encode_apart, TrainStep.__call__ = counted, weighed


if __name__ == "__main__":
    found = {"encodings": collections.Counter(), "live_bytes": {}, "param_bytes": 0}
    watch(found)
    from cipo_jax.__main__ import main

    code = main(sys.argv[2:])
    with open(sys.argv[1], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(found, file)
    sys.exit(code)
