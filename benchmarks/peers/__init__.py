"""Other tools on the same weights, each in the runtime that its files are for: ``python -m benchmarks.peers``.

    off-grid weights  ->  a file by each tool  ->  MB, what is stored how, perplexity ÷ float, divergence, speed

A tool lives in an environment of its own (:mod:`.environments`) and is given the model as a folder of transformers, or
as the GGUF file that the folder was made of (:mod:`.source`); :mod:`.makers` knows the command of each. What does not
run here is a row with its error. Every file is scored on the windows of :mod:`benchmarks.yardstick`
(:mod:`.scoring`), and :mod:`.stored` reads off it what its weights are, whatever its name promises.
"""
