"""From a captured graph and data to the impact of every site (`calibrate.py` first).

    batches, metrics            the data, kept for every pass over it, and what is measured on it
    execute, replacing, gates   runs of the graph that repeat only what a replacement changes
    scoring, gradient, curve    the measured impact, its estimate from gradients, sites replaced together
    tally, bootstrap            values per image added up, and how far they can be trusted
    cost, fingerprint, resume   what it will take, what it depends on, and going on after a kill
"""
