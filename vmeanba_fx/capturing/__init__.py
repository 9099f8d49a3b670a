"""From a model to a graph: every selective scan that a model's code can reach becomes one node (`capture.py` first).

    registry, families     which callables are scans, and how their arguments map to the canonical call
    discovery, trial       finds them in a model's code; tries on real arguments that they compute the scan
    intercept, codeswap    redirects them to one op for the time of a trace, however they are referenced
    emission               the nodes that a scan call becomes
    standins               PyTorch code for the compiled functions around scans
    confinement, copies    what a trace changes in PyTorch, undone and kept from other threads; private copies of the model
    guards                 which inputs the captured graph takes
"""
