"""Secure sums: the right sum whoever drops out, nothing but the sum for the server, and no phase answered twice."""
import dataclasses

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fedms.privacy import secure_sum as ss
from fedms.privacy import shamir
from fedms.privacy.key_file import Stream, derive

KEY = b"secure sums are tested with this"
SIZE = 9


def group(count, key=KEY):
    secrets = {client: derive(key, "client", client) for client in range(count)}
    identities = {client: ss.identity_of(secret) for client, secret in secrets.items()}
    return {client: ss.Member(client, secret, identities) for client, secret in secrets.items()}


def terms_of(count, size=SIZE, sigma=0, **changes):
    return dataclasses.replace(ss.Terms("run", "stage1", 3, 0, ss.threshold_of(count), ((size, sigma),)), **changes)


def vectors_of(count, size=SIZE):
    rng = np.random.default_rng(7)
    return {client: rng.integers(-2**16, 2**16 + 1, size) for client in range(count)}


class Sum:
    """A secure sum in which the named clients stop before answering a phase."""

    def __init__(self, members, terms, vectors, gone=((), (), (), ())):
        self.members, self.terms, self.vectors = members, terms, vectors
        self.promises = {client: ss.Promises() for client in members}
        self.gone = [set().union(*gone[:phase + 1]) for phase in range(4)]

    def run(self):
        m, t, v, p = self.members, self.terms, self.vectors, self.promises
        self.roster = {i: ss.advertise(m[i], t, v[i]) for i in m if i not in self.gone[0]}
        boxes = {i: ss.share(m[i], t, v[i], self.roster, p[i]) for i in self.roster if i not in self.gone[1]}
        self.present = sorted(boxes)
        self.inbox = {j: {i: boxes[i][j] for i in boxes if i != j} for j in boxes}
        answers = {i: ss.mask(m[i], t, v[i], self.roster, self.inbox[i], p[i]) for i in self.present if i not in self.gone[2]}
        self.masked, self.opened = ({i: answer[part] for i, answer in answers.items()} for part in (0, 1))
        self.survivors = sorted(self.masked)
        self.revealed = {i: ss.reveal(m[i], t, v[i], self.roster, self.opened[i], self.survivors, p[i])
                         for i in self.survivors if i not in self.gone[3]}
        return ss.unmask(t, self.roster, self.present, self.masked, self.revealed)


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("phase", range(4))
def test_dropouts_up_to_the_threshold_in_each_phase(count, phase):
    members, vectors, most = group(count), vectors_of(count), count - ss.threshold_of(count)
    for dropouts in range(most + 2):
        gone = [()] * 4
        gone[phase] = tuple(range(dropouts))
        one = Sum(members, terms_of(count), vectors, gone)
        if dropouts > most:
            with pytest.raises(ss.ProtocolError, match="are needed|at least"):
                one.run()
            continue
        expected = sum(v for i, v in vectors.items() if phase == 3 or i >= dropouts)
        assert (one.run() == expected).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=9, max_size=9), st.integers(0, 5))
def test_dropouts_spread_over_the_phases(stops, size):
    """stops: the phase before which each of nine clients stops; 4: it does not."""
    gone = [tuple(i for i, stop in enumerate(stops) if stop == phase) for phase in range(4)]
    vectors = vectors_of(9, size)
    one = Sum(group(9), terms_of(9, size), vectors, gone)
    if sum(stop == 4 for stop in stops) < ss.threshold_of(9):
        with pytest.raises(ss.ProtocolError):
            one.run()
    else:
        expected = sum(v for i, v in vectors.items() if stops[i] >= 3)
        assert (one.run() == expected).all()


def test_threshold_is_above_two_thirds():
    assert [ss.threshold_of(n) for n in (3, 4, 6, 12, 100)] == [3, 3, 5, 9, 67]


def test_masked_vectors_of_two_different_updates_cannot_be_told_apart():
    """One client has either of two updates; over 300 keys the masked values are uniform, and no statistic of a two-sample
    test tells the two apart. Without the masks the same test tells them apart at once."""
    vectors = vectors_of(4, 1)
    seen = {}
    for update in (-2**16, 2**16):
        vectors[0] = np.array([update])
        masked = []
        for number in range(300):
            one = Sum(group(4, derive(KEY, number)), terms_of(4, 1), vectors)
            one.run()
            masked.append(int(one.masked[0][0]))
        seen[update] = np.array(masked) / 2**32
    assert scipy.stats.ks_2samp(*seen.values()).pvalue > 0.01
    assert all(scipy.stats.kstest(values, "uniform").pvalue > 0.01 for values in seen.values())
    assert scipy.stats.ks_2samp([-2**16] * 300, [2**16] * 300).pvalue < 1e-9


def test_server_view_is_the_same_for_any_two_updates_with_the_same_sum():
    """Two clients exchange their updates: the server learns the same sum from shares and vectors that have no value in common."""
    members, vectors = group(4), vectors_of(4)
    first, second = Sum(members, terms_of(4), vectors), Sum(members, terms_of(4), {**vectors, 0: vectors[1], 1: vectors[0]})
    assert (first.run() == second.run()).all()
    assert all((first.masked[i] != second.masked[i]).all() for i in range(4))
    assert all(first.roster[i] != second.roster[i] for i in (0, 1))


def test_server_never_gets_both_secrets_of_a_client():
    one = Sum(group(7), terms_of(7), vectors_of(7), [(), (), (2,), (5,)])
    one.run()
    for client in one.present:
        kept = {shares[client] for shares in one.revealed.values()}
        secret = shamir.combine({i: shares[client] for i, shares in one.revealed.items()}, one.terms.threshold)
        assert len(kept) == len(one.revealed)
        assert (ss._public(secret) == one.roster[client]) == (client == 2)


def test_repeated_round_repeats_every_byte_and_any_change_changes_all():
    members, vectors = group(4), vectors_of(4)
    first, again = Sum(members, terms_of(4), vectors), Sum(members, terms_of(4), vectors)
    first.run(), again.run()
    assert first.roster == again.roster and first.inbox == again.inbox and first.revealed == again.revealed
    assert all((first.masked[i] == again.masked[i]).all() for i in range(4))
    for other in (Sum(members, terms_of(4, attempt=1), vectors), Sum(members, terms_of(4, round=4), vectors),
                  Sum(members, terms_of(4), {**vectors, 3: vectors[3] + 1}), Sum(members, terms_of(4), vectors, [(3,), (), (), ()])):
        other.run()
        assert all((first.masked[i] != other.masked[i]).all() for i in other.masked)


def test_noise_of_all_clients_together_and_fresh_for_another_roster():
    sigma, count, size = 50_000, 4, 4000
    vectors = {i: np.zeros(size, np.int64) for i in range(count)}
    whole = Sum(group(count), terms_of(count, size, sigma), vectors).run()
    short = Sum(group(count), terms_of(count, size, sigma), vectors, [(3,), (), (), ()]).run()
    assert whole.std() == pytest.approx(sigma * 2, rel=0.04) and short.std() == pytest.approx(sigma * 3**0.5, rel=0.04)
    assert abs(np.corrcoef(whole, short)[0, 1]) < 0.06
    assert (whole == Sum(group(count), terms_of(count, size, sigma), vectors).run()).all()


def test_noise_by_section():
    terms = dataclasses.replace(terms_of(4), sections=((2000, 0), (2000, 100)))
    total = Sum(group(4), terms, {i: np.zeros(4000, np.int64) for i in range(4)}).run()
    assert not total[:2000].any() and total[2000:].std() == pytest.approx(200, rel=0.1)


def test_sum_is_signed_and_wraps_nowhere_within_31_bits():
    vectors = {i: np.array([2**29 - 1, -2**29, 0]) for i in range(4)}
    assert Sum(group(4), terms_of(4, 3), vectors).run().tolist() == [2**31 - 4, -2**31, 0]


# Servers and clients that do not keep to the rules

@pytest.fixture
def honest():
    one = Sum(group(4), terms_of(4), vectors_of(4))
    one.run()
    return one


def asked(one, phase, **changes):
    """What client 1 says when it is asked again, with some arguments changed."""
    values = {"roster": one.roster, "inbox": one.inbox[1], "opened": one.opened[1], "survivors": one.survivors, "terms": one.terms,
              "vector": one.vectors[1], "promises": one.promises[1]} | changes
    base = one.members[1], values["terms"], values["vector"], values["roster"]
    if phase == "share":
        return ss.share(*base, values["promises"])
    if phase == "mask":
        return ss.mask(*base, values["inbox"], values["promises"])[0]
    return ss.reveal(*base, values["opened"], values["survivors"], values["promises"])


def test_same_question_same_answer(honest):
    assert (asked(honest, "mask") == honest.masked[1]).all() and asked(honest, "reveal") == honest.revealed[1]


def test_second_set_of_survivors_is_refused(honest):
    with pytest.raises(ss.ProtocolError, match="start a new attempt"):
        asked(honest, "reveal", survivors=[1, 2, 3])


def test_second_inbox_is_refused(honest):
    fewer = {i: box for i, box in honest.inbox[1].items() if i != 0}
    with pytest.raises(ss.ProtocolError, match="start a new attempt"):
        asked(honest, "mask", inbox=fewer)


def test_second_roster_is_refused(honest):
    with pytest.raises(ss.ProtocolError, match="start a new attempt"):
        asked(honest, "share", roster={i: key for i, key in honest.roster.items() if i != 0})


@pytest.mark.parametrize("survivors", [[0, 1], [0, 2, 3], [0, 1, 9], []])
def test_survivors_that_cannot_be(honest, survivors):
    with pytest.raises(ss.ProtocolError, match="expected at least 3 of the 4"):
        asked(honest, "reveal", survivors=survivors, promises=ss.Promises())


def test_roster_with_a_changed_key_is_noticed_by_the_others(honest):
    """The server puts its own key in the place of client 0's, to read what is meant for it."""
    forged = {**honest.roster, 0: ss.identity_of(bytes(32))}
    with pytest.raises(ss.ProtocolError, match="was told another list of clients"):
        asked(honest, "mask", roster=forged, promises=ss.Promises())


def test_roster_with_a_stranger_or_without_oneself(honest):
    with pytest.raises(ss.ProtocolError, match="client 9, whose identity was not agreed on"):
        asked(honest, "share", roster={**honest.roster, 9: bytes(32)}, promises=ss.Promises())
    with pytest.raises(ss.ProtocolError, match="lacks this client's key"):
        asked(honest, "share", roster={i: k for i, k in honest.roster.items() if i != 1}, promises=ss.Promises())
    with pytest.raises(ss.ProtocolError, match="2 clients, but 3 are needed"):
        asked(honest, "share", roster={i: honest.roster[i] for i in (0, 1)}, promises=ss.Promises())


@pytest.mark.parametrize("box", [b"", bytes(ss.BOX_BYTES), bytes(5)])
def test_box_that_was_tampered_with(honest, box):
    with pytest.raises(ss.ProtocolError, match="client 2 is said to have sent"):
        asked(honest, "mask", inbox={**honest.inbox[1], 2: box}, promises=ss.Promises())


def test_public_key_of_low_order_is_refused(honest):
    roster = {**honest.roster, 0: bytes(32)}
    with pytest.raises(ss.ProtocolError):
        asked(honest, "mask", roster=roster, promises=ss.Promises())


def test_vector_of_another_length(honest):
    with pytest.raises(ss.ProtocolError, match=r"expected \(9,\)"):
        asked(honest, "share", vector=np.zeros(3, np.int64))


def test_shares_that_do_not_belong_together(honest):
    wrong = {**honest.revealed, 0: {**honest.revealed[0], 2: bytes(33)}}
    result = None
    try:
        result = ss.unmask(honest.terms, honest.roster, honest.present, honest.masked, wrong)
    except ss.ProtocolError as error:
        assert "client 2" in str(error)
    assert result is None or (result != sum(honest.vectors.values())).any()
    lacking = {i: {c: s for c, s in shares.items() if c != 2} for i, shares in honest.revealed.items()}
    with pytest.raises(ss.ProtocolError, match="client 2"):
        ss.unmask(honest.terms, honest.roster, honest.present, honest.masked, lacking)


def test_forged_key_of_a_client_that_is_gone():
    one = Sum(group(4), terms_of(4), vectors_of(4), [(), (), (3,), ()])
    one.run()
    forged = {i: share for i, (share,) in shamir.split([b"x" * 32], one.survivors, one.terms.threshold, [Stream(bytes(32))]).items()}
    with pytest.raises(ss.ProtocolError, match="client 3's key give another key"):
        ss.unmask(one.terms, one.roster, one.present, one.masked, {i: {**r, 3: forged[i]} for i, r in one.revealed.items()})


# Secret sharing

@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_shamir_any_threshold_shares_give_the_secrets(secret, threshold, more, random):
    holders = sorted(random.sample(range(50), threshold + more))
    secrets = [secret, b"\xff" * 32]
    shares = shamir.split(secrets, holders, threshold, [Stream(bytes(32)), Stream(b"1" * 32)])
    for place, wanted in enumerate(secrets):
        chosen = random.sample(holders, threshold)
        assert shamir.combine({holder: shares[holder][place] for holder in chosen}, threshold) == wanted
    alone = shamir.split(secrets[1:], holders, threshold, [Stream(b"1" * 32)])
    assert all(alone[holder] == shares[holder][1:] for holder in holders)
    if threshold > 1:
        with pytest.raises(ValueError, match="are needed"):
            shamir.combine({holder: shares[holder][0] for holder in chosen[1:]}, threshold)


def test_shamir_fewer_shares_say_nothing():
    """With one share short of the threshold, every secret is as likely: for any other secret there is one last share."""
    shares = {holder: share for holder, (share,) in shamir.split([b"a" * 32], [0, 1, 2], 3, [Stream(bytes(32))]).items()}
    two = {0: shares[0], 1: shares[1]}
    weights = shamir._at_zero((0, 1, 2))
    partial = sum(w * int.from_bytes(s, "big") for w, s in zip(weights, two.values()))
    for wanted in (b"b" * 32, bytes(32), b"\xff" * 32):
        last = (int.from_bytes(wanted, "big") - partial) * pow(weights[2], -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine({**two, 2: last.to_bytes(33, "big")}, 3) == wanted


def test_shamir_prime_is_prime_and_bad_arguments():
    n = shamir.PRIME - 1
    assert all(pow(a, n, shamir.PRIME) == 1 and pow(a, n // 2, shamir.PRIME) in (1, n) for a in range(2, 60))
    for arguments in ((b"short", [0, 1], 2), (bytes(32), [0, 0], 2), (bytes(32), [0, 1], 0), (bytes(32), [-1], 1)):
        with pytest.raises(ValueError):
            shamir.split([arguments[0]], *arguments[1:], [Stream(bytes(32))])
