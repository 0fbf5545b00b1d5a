"Megatron's pair of files, damaged at places whose meaning is known."

from fuzz.cases import TRAIN, TRAIN_BERT, Accepted, add, cut, damage, extend, flip, put, refused

KIND = "token files"
LINE = f"{TRAIN} --data gpt2"
VERSION, CODE, SEQUENCES, OFFSETS, BODY = 9, 17, 18, 26, 34  # places in tokens.idx
COUNT = 40  # documents of the clean text
INDEX, TOKENS = refused(r"tokens\.idx"), refused(r"tokens\.bin")


def index(folder):
    return folder / "gpt2/tokens.idx"


def tokens(folder):
    return folder / "gpt2/tokens.bin"


@damage(KIND, LINE, INDEX, times=6)
def magic_changed(folder, chance):
    flip(index(folder), 0, VERSION, chance)


@damage(KIND, LINE, INDEX, times=6)
def version_changed(folder, chance):
    flip(index(folder), VERSION, CODE, chance)


@damage(KIND, LINE, INDEX, times=6)
def type_of_no_token(folder, chance):
    put(index(folder), CODE, "<B", chance.choice([0, 6, 7, *range(9, 256)]))


@damage(KIND, LINE, refused(r"tokens\.(idx|bin)"), times=4)
def type_of_another_size(folder, chance):
    put(index(folder), CODE, "<B", chance.choice([1, 2, 4, 5]))


@damage(KIND, LINE, Accepted("train"))
def type_with_a_sign(folder, chance):
    put(index(folder), CODE, "<B", 3)


@damage(KIND, LINE, INDEX, times=6)
def another_number_of_sequences(folder, chance):
    put(index(folder), SEQUENCES, "<Q", chance.choice([0, 1, COUNT - 1, COUNT + 1, 10**6]))


@damage(KIND, LINE, INDEX, times=6)
def a_huge_number(folder, chance):
    number = chance.choice([2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 // 12])
    put(index(folder), chance.choice([SEQUENCES, OFFSETS]), "<Q", number)


@damage(KIND, LINE, INDEX, times=4)
def another_number_of_documents(folder, chance):
    put(index(folder), OFFSETS, "<Q", chance.choice([0, 1, COUNT, COUNT + 2]))


@damage(KIND, LINE, INDEX, times=10)
def index_cut_short(folder, chance):
    cut(index(folder), chance)


@damage(KIND, LINE, INDEX, times=3)
def index_cut_in_its_head(folder, chance):
    index(folder).write_bytes(index(folder).read_bytes()[: chance.randrange(BODY)])


@damage(KIND, LINE, TOKENS, times=6)
def tokens_cut_short(folder, chance):
    cut(tokens(folder), chance)


@damage(KIND, LINE, INDEX, times=4)
def index_too_long(folder, chance):
    extend(index(folder), chance)


@damage(KIND, LINE, TOKENS, times=4)
def tokens_too_long(folder, chance):
    extend(tokens(folder), chance)


@damage(KIND, LINE, refused(r"tokens\.(idx|bin)"), times=10)
def a_size_changed(folder, chance):
    flip(index(folder), BODY, BODY + 4 * COUNT, chance)


@damage(KIND, LINE, INDEX, times=10)
def a_start_changed(folder, chance):
    flip(index(folder), BODY + 4 * COUNT, BODY + 12 * COUNT, chance)


@damage(KIND, LINE, INDEX, times=6)
def an_end_of_documents_changed(folder, chance):
    place = BODY + 12 * COUNT + 8 * chance.choice([0, COUNT])
    flip(index(folder), place, place + 8, chance)


@damage(KIND, LINE, INDEX, times=6)
def a_document_that_ends_before_it_begins(folder, chance):
    number = chance.randrange(1, COUNT)
    value = chance.choice([-1, -(2**63), 0 if number > 1 else -5, COUNT + 1, 2**62])
    put(index(folder), BODY + 12 * COUNT + 8 * number, "<q", value)


@damage(KIND, LINE, refused(r"tokens\.bin", "token id"), times=8)
def an_id_outside_the_vocabulary(folder, chance):
    place = 2 * chance.randrange(tokens(folder).stat().st_size // 2)
    put(tokens(folder), place, "<H", chance.randrange(600, 2**16))


@damage(KIND, LINE, INDEX)
def tokens_in_place_of_the_index(folder, chance):
    index(folder).write_bytes(tokens(folder).read_bytes())


@damage(KIND, LINE, TOKENS)
def index_in_place_of_the_tokens(folder, chance):
    tokens(folder).write_bytes(index(folder).read_bytes())


@damage(KIND, LINE, refused(r"tokens\.(idx|bin)"))
def halves_swapped(folder, chance):
    first, second = tokens(folder).read_bytes(), index(folder).read_bytes()
    tokens(folder).write_bytes(second)
    index(folder).write_bytes(first)


@damage(KIND, LINE, INDEX)
def no_index(folder, chance):
    index(folder).unlink()


@damage(KIND, LINE, TOKENS)
def no_tokens(folder, chance):
    tokens(folder).unlink()


@damage(KIND, LINE, INDEX)
def a_folder_in_place_of_the_index(folder, chance):
    index(folder).unlink()
    index(folder).mkdir()


@damage(KIND, LINE, TOKENS)
def a_link_to_nothing_in_place_of_the_tokens(folder, chance):
    tokens(folder).unlink()
    tokens(folder).symlink_to("nowhere")


@damage(KIND, LINE, refused("0 documents"))
def no_document_at_all(folder, chance):
    head = bytearray(index(folder).read_bytes()[:BODY])
    index(folder).write_bytes(head + bytes(8))
    put(index(folder), SEQUENCES, "<Q", 0)
    put(index(folder), OFFSETS, "<Q", 1)
    tokens(folder).write_bytes(b"")


@damage(KIND, LINE, Accepted("train"))
def sequence_modes(folder, chance):
    index(folder).write_bytes(index(folder).read_bytes() + bytes(COUNT))


for name in ("tokens", "tokens.bin", "tokens.idx"):
    add(KIND, f"named as {name}", f"{TRAIN} --data gpt2/{name}", Accepted("train"))
add(KIND, "the whole path", f"{TRAIN} --data ./gpt2/../gpt2/", Accepted("train"), needs=["gpt2"])
add(KIND, "a BERT's for a GPT-2", f"{TRAIN} --data bert", refused("bert", "--model"))
add(KIND, "a GPT-2's for a BERT", f"{TRAIN_BERT} --data gpt2", refused("gpt2", "--model"))
