"""The reference of the embedding sum: equation (2) written out, its zero rows and its dropout."""

import pytest
import torch
from genrec_kernels.torch_reference import embedding_sum

B, L, D = 3, 7, 6
torch.manual_seed(0)
TOKENS, POSITIONS = torch.randint(0, 11, (B, L)), torch.randint(0, 9, (B, L))
USERS, ITEMS = torch.randint(0, 4, (B, L)), torch.randint(0, 5, (B, L))
INDICES = (TOKENS, POSITIONS, USERS, ITEMS)


def tables() -> list[torch.Tensor]:
    torch.manual_seed(1)
    made = [torch.randn(rows, D, dtype=torch.float64) for rows in (11, 9, 4, 5)]
    made[2][0] = made[3][0] = 0
    return [table.requires_grad_() for table in made]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_it_adds_the_four_terms_of_each_token(scale):
    token, position, user, item = tables()
    summed = embedding_sum(*INDICES, token, position, user, item, scale=scale)
    for row in range(B):
        for column in range(L):
            expected = (
                token[TOKENS[row, column]] * scale
                + position[POSITIONS[row, column]]
                + user[USERS[row, column]]
                + item[ITEMS[row, column]]
            )
            torch.testing.assert_close(summed[row, column], expected)


def test_a_missing_table_adds_nothing():
    token, position, user, item = tables()
    zeros_user, zeros_item = torch.zeros_like(user), torch.zeros_like(item)
    for left_out in ((None, item), (user, None), (None, None)):
        filled = (
            left_out[0] if left_out[0] is not None else zeros_user,
            left_out[1] if left_out[1] is not None else zeros_item,
        )
        ours = embedding_sum(*INDICES, token, position, *left_out)
        torch.testing.assert_close(ours, embedding_sum(*INDICES, token, position, *filled))


def test_gradients_count_repeated_rows_and_spare_row_0_and_padding():
    token, position, user, item = tables()
    weight = torch.randn(B, L, D, dtype=torch.float64)
    (
        embedding_sum(*INDICES, token, position, user, item, scale=2.0, pad_token_id=3) * weight
    ).sum().backward()
    for table, rows, factor, silent in (
        (token, TOKENS, 2.0, 3),
        (position, POSITIONS, 1.0, None),
        (user, USERS, 1.0, 0),
        (item, ITEMS, 1.0, 0),
    ):
        expected = (
            torch.zeros_like(table)
            .index_add_(0, rows.flatten(), weight.flatten(0, 1) * factor)
            .detach()
        )
        if silent is not None:
            expected[silent] = 0
        torch.testing.assert_close(table.grad, expected)


def test_id_dropout_drops_the_id_terms_alone_and_only_in_training():
    token, position, user, item = tables()
    plain = embedding_sum(*INDICES, token, position, None, None)
    whole = embedding_sum(*INDICES, token, position, user, item)
    assert torch.equal(embedding_sum(*INDICES, token, position, user, item, id_dropout=0.5), whole)
    assert torch.equal(
        embedding_sum(*INDICES, token, position, user, item, id_dropout=1.0, training=True), plain
    )
    torch.manual_seed(0)
    total = sum(
        embedding_sum(*INDICES, token, position, user, item, id_dropout=0.5, training=True)
        for _ in range(4000)
    )
    torch.testing.assert_close(total / 4000, whole, atol=0.15, rtol=0)
