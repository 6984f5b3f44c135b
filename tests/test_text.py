import numpy as np

from dreamerv3_jax.envs import text


def test_words_are_told_apart_in_their_order():
    pick, drop = text.embed('pick up the red ball'), text.embed('drop the red ball')
    np.testing.assert_array_equal(pick[32:48], drop[16:32])  # the third word and the second: 'the'
    assert not np.array_equal(pick[:16], drop[:16])
    assert not np.array_equal(text.embed('red ball'), text.embed('ball red'))
    assert text.space().contains(pick)


def test_hash_of_a_word_by_hand():
    # sha256(b'red') begins with 0xb1 0xf5: 1011 0001 1111 0101.
    signs = [1, -1, 1, 1, -1, -1, -1, 1, 1, 1, 1, 1, -1, 1, -1, 1]
    np.testing.assert_array_equal(text.embed('red')[:16], signs)


def test_case_punctuation_and_length():
    np.testing.assert_array_equal(text.embed('Go, go!'), text.embed('go go'))
    assert not text.embed('').any()
    assert not text.embed('one two')[32:].any()
    many = ' '.join(map(str, range(100)))
    np.testing.assert_array_equal(text.embed(many), text.embed(many + ' more'))
