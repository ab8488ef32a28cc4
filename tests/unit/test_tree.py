"""The shape of the gradient tree, and who pushes which of its nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.tree import Tree, TreeNode, tree_of

SIZES = st.integers(1, 300)


def expression(tree: Tree, node: TreeNode) -> str:
    """The sum as people write it, from the merges alone."""
    if node.leaves == 1:
        return str(node.first)
    left_count = next(n for n in range(1, node.leaves) if _is_left(tree, node, n))
    left, right = TreeNode(node.first, left_count), TreeNode(node.first + left_count, node.leaves - left_count)
    return f"({expression(tree, left)}+{expression(tree, right)})"


def _is_left(tree: Tree, parent: TreeNode, count: int) -> bool:
    left = TreeNode(parent.first, count)
    merge = tree.merge_of(left) if left in tree else None
    return merge is not None and merge.parent == parent


@pytest.mark.parametrize(
    ("leaves", "shape"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (4, "((0+1)+(2+3))"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_the_left_child_takes_the_largest_power_of_two_below(leaves: int, shape: str) -> None:
    tree = Tree(leaves)

    assert expression(tree, tree.root) == shape


@pytest.mark.parametrize("leaves", [0, -1])
def test_a_tree_has_leaves(leaves: int) -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        Tree(leaves)


@given(leaves=SIZES)
def test_a_tree_has_one_addition_fewer_than_leaves_and_each_joins_neighbours(leaves: int) -> None:
    tree = Tree(leaves)
    merges = {tree.merge_of(node) for node in _nodes(tree) if node != tree.root}

    assert len(merges) == leaves - 1
    for merge in merges:
        assert merge is not None
        assert merge.left.first + merge.left.leaves == merge.right.first
        assert merge.parent == TreeNode(merge.left.first, merge.left.leaves + merge.right.leaves)
        half = merge.left.leaves
        assert half & (half - 1) == 0 and half < merge.parent.leaves <= 2 * half


@pytest.mark.parametrize("node", [TreeNode(1, 2), TreeNode(0, 3), TreeNode(0, 0), TreeNode(8, 1), TreeNode(4, 5)])
def test_what_is_no_node_is_told_apart(node: TreeNode) -> None:
    tree = Tree(8)

    assert node not in tree
    with pytest.raises(KeyError):
        tree.merge_of(node)


def test_the_root_is_in_no_addition() -> None:
    assert Tree(1).merge_of(TreeNode(0, 1)) is None
    assert Tree(6).merge_of(TreeNode(0, 6)) is None


@given(leaves=SIZES, data=st.data())
def test_a_cover_has_exactly_the_leaves_in_the_fewest_nodes(leaves: int, data: st.DataObject) -> None:
    tree = tree_of(leaves)
    wanted = data.draw(st.sets(st.integers(0, leaves - 1)))

    cover = tree.cover(wanted)

    covered = [leaf for node in cover for leaf in range(node.first, node.first + node.leaves)]
    assert covered == sorted(wanted)
    assert all(node in tree for node in cover)
    for node in cover:  # a bigger node would have leaves that are not wanted
        merge = tree.merge_of(node)
        assert merge is None or not set(range(merge.parent.first, merge.parent.first + merge.parent.leaves)) <= wanted


@given(a=st.tuples(st.integers(0, 9), st.integers(1, 9)), b=st.tuples(st.integers(0, 9), st.integers(1, 9)))
def test_covering_is_containing_all_leaves(a: tuple[int, int], b: tuple[int, int]) -> None:
    one, other = TreeNode(*a), TreeNode(*b)
    leaves_of = {node: set(range(node.first, node.first + node.leaves)) for node in (one, other)}

    assert one.covers(other) == (leaves_of[one] >= leaves_of[other])


def test_equal_trees_are_shared() -> None:
    assert tree_of(12) is tree_of(12)


def _nodes(tree: Tree) -> list[TreeNode]:
    """Every node, found from the leaves up."""
    found = {TreeNode(leaf, 1) for leaf in range(tree.root.leaves)}
    for node in sorted(found):
        merge = tree.merge_of(node)
        while merge is not None:
            found.add(merge.parent)
            merge = tree.merge_of(merge.parent)
    return sorted(found)
