def pytest_collection_modifyitems(items):
    """Modules of long tests first, so that no process is left alone with one at the end of a parallel run."""
    longest = {}
    for item in items:
        seconds = [mark.kwargs.get("seconds", 10) for mark in item.iter_markers("slow")]
        longest[item.path] = max([longest.get(item.path, 0), *seconds])
    items.sort(key=lambda item: -longest[item.path])
