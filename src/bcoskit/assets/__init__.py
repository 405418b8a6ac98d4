"""The weights and photographs that ship."""
