"""Methods that make a transformer's key/value cache smaller, whatever form people have them in, behind one door."""

from __future__ import annotations

from knorm.methods.budget import Budget as Budget
from knorm.methods.door import method as method
from knorm.methods.method import Method as Method
from knorm.methods.method import MethodError as MethodError
