"""Shapes of prefix trees without tokens, laid out as `sami_fast.pack` lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sami_fast.prefix_tree import AttentionPlan


@dataclass(frozen=True)
class Node:
    """A run of `length` tokens, with the nodes that branch off its end."""

    length: int
    below: tuple[Node, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the whole subtree."""
        return self.length + sum(node.tokens for node in self.below)


def group(query: int, prompts: int, constitution: int, responses: int, response: int) -> Node:
    """A query, its constitutions and the responses to each; a response's last token is predicted, not encoded."""
    answers = (Node(response - 1),) * responses
    if constitution == 0:
        return Node(query, answers * prompts)
    return Node(query, (Node(constitution, answers),) * prompts)


def chain(turns: int, turn: int, side: int) -> Node:
    """A trunk of `turns` nodes, each of which also ends in a side branch: dialogues, and searches for an answer."""
    node = Node(turn, (Node(side),))
    for _ in range(turns - 1):
        node = Node(turn, (node, Node(side)))
    return node


def fill(tree: Node, tokens: int) -> AttentionPlan:
    """Plan of as many copies of `tree` as `tokens` hold, at least one."""
    starts, ends, subtree_ends, depths = [], [], [], []

    def visit(node: Node, start: int, depth: int) -> int:
        at = len(starts)
        starts.append(start)
        ends.append(start + node.length)
        depths.append(depth)
        subtree_ends.append(0)
        end = ends[at]
        for child in node.below:
            end = visit(child, end, depth + node.length)
        subtree_ends[at] = end
        return end

    end = 0
    for _ in range(max(1, tokens // tree.tokens)):
        end = visit(tree, end, 0)
    lengths = np.subtract(ends, starts)
    positions = np.arange(end) + np.repeat(np.subtract(depths, starts), lengths)
    return AttentionPlan.build(np.repeat(subtree_ends, lengths), positions)
