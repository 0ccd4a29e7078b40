"""Drafts that copy: what followed the same tokens before (arXiv 2411.04975), here or in a text beside (2304.04487)."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from thoughtformer.checks import check_count
from thoughtformer.decode.drafting import Draft, Drafter, Guess

__all__ = ["Occurrences", "Suffix"]

#: Tokens that must agree before anything is copied: those by which places are found.
LEAST_MATCH = 2
#: A copied token that is less likely than this, by how often it followed, ends the draft.
LEAST_SHARE = 0.1
#: Steps without a match behind the end of a copy, in which it is tried to go on with it.
MOST_WITHOUT = 4


class Place(NamedTuple):
    """Where to copy from.

    Attributes:
        matched: tokens before it that agree with a text's last ones.
        text, start: it comes before this token of the text.
        follows: what is copied.
    """

    matched: int
    text: Sequence[int]
    start: int
    follows: Sequence[int]


class Path(NamedTuple):
    """What is copied: from where first of all, its tokens, and of each the share of places that went on so."""

    place: Place | None
    ids: list[int]
    shares: list[float]


class Occurrences:
    """Texts, and where in them each pair of neighbours stands.

    Args:
        is_growing: it is one text, whose end is asked about as it grows.
    """

    def __init__(self, *, is_growing: bool = False) -> None:
        self.is_growing = is_growing
        self._texts: list[list[int]] = [[]] if is_growing else []
        self._places: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self.num_tokens = 0

    def add(self, ids: Sequence[int]) -> None:
        """Another text."""
        self._texts.append([])
        self.grow(ids)

    def grow(self, ids: Sequence[int]) -> None:
        """The last text has become `ids`: what is known of it, and more."""
        text = len(self._texts) - 1
        known = self._texts[text]
        for token in islice(ids, len(known), None):
            if known:
                self._places[known[-1], token].append((text, len(known) + 1))
            known.append(token)
            self.num_tokens += 1

    def forget(self, num_tokens: int) -> None:
        """Lets go of the oldest texts, until no more than so many tokens are left."""
        texts, self._texts = self._texts, []
        left, first = self.num_tokens, 0
        while left > num_tokens:
            left -= len(texts[first])
            first += 1
        self._places.clear()
        self.num_tokens = 0
        for text in texts[first:]:
            self.add(text)

    def behind(self, ids: Sequence[int], *, most_match: int, most_tokens: int, most_places: int) -> Iterator[Place]:
        """Where the last two of `ids` stand, the latest first.

        A text's end is no such place, since nothing follows. What follows to the end of a growing text goes on in
        rounds, as a loop would.
        """
        if len(ids) < LEAST_MATCH:
            return
        places = (
            (self._texts[text], place)
            for text, place in reversed(self._places.get((ids[-2], ids[-1]), ()))
            if place < len(self._texts[text])
        )
        for text, place in islice(places, most_places):
            longest = min(most_match, place, len(ids))
            matched = LEAST_MATCH
            while matched < longest and text[place - 1 - matched] == ids[-1 - matched]:
                matched += 1
            follows = text[place : place + most_tokens]
            if self.is_growing:
                follows = (follows * most_tokens)[:most_tokens]
            yield Place(matched, text, place, follows)


class _Shares:
    """How much of what was promised came true, by how many tokens agreed and how far behind the match."""

    #: Promises that count as made before anything was seen, and how much of a count is left after another observation.
    PRIOR, KEPT = 2.0, 0.98
    #: Of drafts that weren't worth verifying, one in so many is judged as if nothing had been seen.
    RETRIED = 32

    def __init__(self) -> None:
        #: Tokens that were expected to be chosen, given that those before them were, and those that were chosen.
        self._counts: dict[tuple[int, int], tuple[float, float]] = {}
        self._passed_over: dict[int, int] = {}

    def rate(self, matched: int, place: int) -> float:
        """By which a promise is to be taken."""
        promised, kept = self._count(matched, place)
        return min(kept / promised, 1.0)

    def _count(self, matched: int, place: int) -> tuple[float, float]:
        # Before anything was seen, of a longer match more is believed: a third of two tokens', two thirds of eight's.
        believed = matched / (matched + 4) if matched else 0.5
        return self._counts.get((min(matched, 8), place), (self.PRIOR, self.PRIOR * believed))

    def add(self, matched: int, place: int, promised: float, was_right: bool) -> None:
        before = self._count(matched, place)
        counts = (before[0] * self.KEPT + promised, before[1] * self.KEPT + was_right)
        self._counts[min(matched, 8), place] = counts

    def passed_over(self, matched: int) -> None:
        """A draft wasn't verified at all: now and then, one is to be tried again."""
        matched = min(matched, 8)
        self._passed_over[matched] = self._passed_over.get(matched, 0) + 1
        if self._passed_over[matched] >= self.RETRIED:
            self._passed_over[matched] = 0
            self._counts = {key: counts for key, counts in self._counts.items() if key[0] != matched}


class Suffix(Drafter):
    """Copies what followed the longest match of a request's last tokens.

    It looks in the request's own text, in what its client predicts of it, and in the client's earlier texts.

    Of all places where at least two tokens agree, those are taken whose continuation promises the most chosen tokens:
    at each token the one that followed most often, the latest first. What a token is promised is how often it followed,
    times how often such promises were kept. Where nothing agrees, the last copy goes on behind as many tokens as were
    chosen since, as if they stood in the place of others.

    Args:
        most_match: tokens that are compared; a longer match promises more.
        most_tokens: of a draft; of a match of m tokens, 2 m at most.
        most_places: that are looked at; the latest.
        remembered_tokens: of finished requests, all clients' together; a token takes about 300 bytes. Who was away for
            longest is forgotten first. 0: each request copies from its own text alone.

    Raises:
        ConfigError: a setting out of range.
    """

    name = "suffix"

    def __init__(
        self,
        *,
        most_match: int = 16,
        most_tokens: int = 8,
        most_places: int = 32,
        remembered_tokens: int = 100_000,
    ) -> None:
        check_count("most_match", most_match, LEAST_MATCH)
        check_count("most_tokens", most_tokens, 1)
        check_count("most_places", most_places, 1)
        check_count("remembered_tokens", remembered_tokens, 0)
        self.most_match = most_match
        self.most_tokens = most_tokens
        self.most_places = most_places
        self.remembered_tokens = remembered_tokens
        self.shares = _Shares()
        self._clients: OrderedDict[str, Occurrences] = OrderedDict()
        self._num_remembered = 0

    def begin(self, *, client: str = "", prediction: Sequence[int] = (), guess: Guess | None = None) -> _OfRequest:
        return _OfRequest(self, client, prediction)

    def propose(self, ids: Sequence[int], most: int) -> Draft:
        """For a text that nothing is remembered of."""
        return self.begin().propose(ids, most)

    def written_by(self, client: str) -> Occurrences | None:
        """A client's finished texts."""
        return self._clients.get(client)

    def remember(self, client: str, ids: Sequence[int]) -> None:
        if not self.remembered_tokens:
            return
        known = self._clients.setdefault(client, Occurrences())
        self._clients.move_to_end(client)
        before = known.num_tokens
        known.add(ids)
        self._num_remembered += known.num_tokens - before
        while self._num_remembered > self.remembered_tokens and len(self._clients) > 1:
            self._num_remembered -= self._clients.popitem(last=False)[1].num_tokens
        if self._num_remembered > self.remembered_tokens:
            # Half of it at once: forgetting reads what is left anew.
            known.forget(self.remembered_tokens // 2)
            self._num_remembered = known.num_tokens


class _OfRequest(Drafter):
    """One request's: its own text as it grows."""

    def __init__(self, strategy: Suffix, client: str, prediction: Sequence[int]) -> None:
        self.strategy = strategy
        self.client = client
        self.own = Occurrences(is_growing=True)
        self.predicted = Occurrences()
        self._path = NOTHING
        #: A copy that came to an end, from where it would go on if what differs were one token for another.
        self._left_off: Place | None = None
        self._num_without = 0
        if prediction:
            self.predicted.add(prediction)
            self._left_off = Place(0, list(prediction), 0, ())

    def propose(self, ids: Sequence[int], most: int) -> Draft:
        strategy = self.strategy
        self.own.grow(ids)
        sources = [self.predicted, self.own, strategy.written_by(self.client)]
        most = min(most, strategy.most_tokens)
        limits = {"most_match": strategy.most_match, "most_tokens": most, "most_places": strategy.most_places}
        places = [place for source in sources if source is not None for place in source.behind(ids, **limits)]
        if not places and self._left_off is not None:
            _, text, start, _ = self._left_off
            follows = text[start : start + most]
            self._path = Path(Place(0, text, start, follows), list(follows), [1.0] * len(follows))
        else:
            self._path = best_path(places, most)
        place, drafted, shares = self._path
        survival, likely = [], 1.0
        for number, share in enumerate(shares):
            assert place is not None
            likely *= share * strategy.shares.rate(place.matched, number)
            survival.append(likely)
        return Draft(ids=drafted, survival=survival)

    def observe(self, num_verified: int, num_right: int, num_new: int) -> None:
        place, _, shares = self._path
        known = self.strategy.shares
        if place is not None:
            if shares and not num_verified:
                known.passed_over(place.matched)
            for number, share in enumerate(shares[: min(num_verified, num_right + 1)]):
                known.add(place.matched, number, share, number < num_right)
        self._num_without = 0 if place is not None and place.matched else self._num_without + 1
        left_off = self._left_off if place is None else place
        self._left_off = (
            None
            if left_off is None or self._num_without > MOST_WITHOUT
            else left_off._replace(start=left_off.start + num_new)
        )

    def finish(self, ids: Sequence[int]) -> None:
        self.strategy.remember(self.client, ids)


NOTHING = Path(None, [], [])


def best_path(places: Sequence[Place], most: int) -> Path:
    """The continuation that promises the most chosen tokens; of equally frequent tokens the first place's is taken.

    Args:
        places: to copy from.
        most: tokens; twice the match at most.
    """
    best = NOTHING
    for matched in sorted({place.matched for place in places}, reverse=True):
        left = [place for place in places if place.matched >= matched]
        path: list[int] = []
        shares: list[float] = []
        for number in range(min(most, 2 * matched)):
            counts: dict[int, int] = {}
            for place in left:
                if number < len(place.follows):
                    counts[place.follows[number]] = counts.get(place.follows[number], 0) + 1
            token = max(counts, key=lambda token: counts[token], default=-1)
            if not counts or counts[token] < LEAST_SHARE * len(left):
                break
            shares.append(counts[token] / len(left))
            path.append(token)
            left = [place for place in left if number < len(place.follows) and place.follows[number] == token]
        if promised(shares) > promised(best.shares):
            best = Path(left[0]._replace(matched=matched), path, shares)
    return best


def promised(shares: Sequence[float]) -> float:
    """Tokens that are chosen of a chain, if each is with its share once those before it were."""
    total, likely = 0.0, 1.0
    for share in shares:
        likely *= share
        total += likely
    return total
