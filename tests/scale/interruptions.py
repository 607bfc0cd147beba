"""Functions for the argument `progress` that end a node or the call in the middle of the work."""


def killing(cluster, node, after):
    """A `progress` that kills a node after so many results, and the list of the results."""
    done = []

    def kill(results, total):
        for result in results:
            done.append(result)
            if len(done) == after:
                cluster.remove_node(node, allow_graceful=False)
            yield result

    return kill, done


def interrupted(results, total):
    """A `progress` that is interrupted after the first result."""
    yield next(iter(results))
    raise KeyboardInterrupt
