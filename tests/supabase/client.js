// supabase-js as a page has it: a script that defines the global `supabase`.
"use strict";

const { readFileSync } = require("node:fs");
const { runInThisContext } = require("node:vm");

/** The task that the test has written to our standard input. */
exports.task = JSON.parse(readFileSync(0, "utf8"));

/** A client of the task's project, which sends the task's token. */
exports.client = () => {
  runInThisContext(readFileSync(process.argv[2], "utf8"));
  const { url, key, token } = exports.task;
  return globalThis.supabase.createClient(url, key, { accessToken: async () => token });
};
