"""Conversations: messages, answers split into thinking, text and tool calls, tools."""
