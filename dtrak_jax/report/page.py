def page(config, workdir, train, *, queries, scores):
    return "x"
