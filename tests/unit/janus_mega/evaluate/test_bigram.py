"""The bigram baseline is a probability distribution, and no weak one."""

import numpy as np
import pytest

from janus_mega.evaluate.bigram import BigramModel, Discounts, fit_bigram

VOCAB = 50


def markov_documents(count: int, length: int, seed: int) -> list[np.ndarray]:
    """Documents of a chain in which every token has four likely followers."""
    rng = np.random.default_rng(0)
    followers = rng.integers(1, VOCAB, size=(VOCAB, 4))
    walker = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        ids = [0]
        for _ in range(length):
            ids.append(int(followers[ids[-1], walker.integers(4)]) if walker.random() < 0.9 else walker.integers(VOCAB))
        documents.append(np.array(ids, np.int32))
    return documents


def test_probabilities_sum_to_one_after_any_token():
    model = fit_bigram(markov_documents(30, 40, seed=1), VOCAB)
    for left in (0, 1, 7, 49):
        total = sum(np.exp(-model.nats(np.array([left, right]))) for right in range(VOCAB))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_a_token_never_seen_leaves_the_distribution_whole():
    documents = [np.array([0, 1, 2, 1, 2, 1])]
    model = BigramModel(documents, VOCAB)
    total = sum(np.exp(-model.nats(np.array([9, right]))) for right in range(VOCAB))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_it_beats_a_unigram_and_add_one_on_fresh_text():
    train, fresh = markov_documents(60, 60, seed=1), markov_documents(40, 60, seed=2)
    tokens = sum(len(document) - 1 for document in fresh)
    ours = sum(fit_bigram(train, VOCAB).nats(document) for document in fresh) / tokens
    counts = np.ones((VOCAB, VOCAB))
    for document in train:
        np.add.at(counts, (document[:-1], document[1:]), 1)
    add_one = np.log(counts / counts.sum(1, keepdims=True))
    single = np.log(counts.sum(0) / counts.sum())
    assert ours < -sum(add_one[d[:-1], d[1:]].sum() for d in fresh) / tokens
    assert ours < -sum(single[d[1:]].sum() for d in fresh) / tokens
    chain_entropy = 0.9 * np.log(4 / 0.9) + 0.1 * np.log(VOCAB / 0.1)
    assert ours < chain_entropy + 0.35


def test_tuning_looks_at_training_documents_and_helps_or_ties():
    train = markov_documents(60, 60, seed=1)
    plain = BigramModel(train, VOCAB)
    tuned = fit_bigram(train, VOCAB)
    fresh = markov_documents(40, 60, seed=3)
    assert sum(map(tuned.nats, fresh)) <= sum(map(plain.nats, fresh)) * 1.02


def test_scaled_discounts_stay_below_the_counts():
    assert Discounts(0.9, 1.9, 2.9).scaled(2.0) == Discounts(0.99, 1.99, 2.99)
