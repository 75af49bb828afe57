"""What the tests of the law share: a model of server and network, rules that use the whole vocabulary, a walker."""
