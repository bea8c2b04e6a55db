"""Methods that make a transformer's key/value cache smaller, whatever form people have them in, behind one door."""
