//! Strict reading of JSON files: one value, and of what is wrong the path and the line.

use serde::de::DeserializeOwned;

/// Why a JSON text is not the value it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadJson {
    /// The JSON path of the field, `$` for the whole file.
    pub path: String,
    pub line: Option<u32>,
    pub reason: String,
}

/// Parses all of `bytes`; the first thing that is wrong is named by its path.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadJson> {
    let whole = |line: Option<u32>, reason: String| BadJson { path: "$".into(), line, reason };
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(whole(None, "the file is empty; a JSON object is needed".into()));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let line = u32::try_from(inner.line()).ok().filter(|line| *line > 0);
        let reason = sentence(&inner);
        if inner.is_data() && path != "." && path != "?" { BadJson { path: format!("$.{path}"), line, reason } } else { whole(line, reason) }
    })?;
    deserializer.end().map_err(|error| whole(u32::try_from(error.line()).ok(), format!("something follows the JSON value: {}", sentence(&error))))?;
    Ok(value)
}

fn sentence(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // The line has its own field; here it would only be said twice.
    let text = text.split(" at line ").next().unwrap_or(&text).to_owned();
    let text = if error.is_data() { text } else { format!("not JSON: {text}") };
    diarch_ipc::frame::printable(&text, 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        list: Vec<Inner>,
    }
    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        n: u8,
    }

    fn wrong(text: &str) -> BadJson {
        parse::<Outer>(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn the_path_leads_to_the_field() {
        let error = wrong("{\"list\": [{\"n\": 1},\n {\"n\": 300}]}");
        assert_eq!((error.path.as_str(), error.line), ("$.list[1].n", Some(2)));
        assert_eq!(wrong("{\"list\": [{\"m\": 1}]}").path, "$.list[0].m");
    }

    #[test]
    fn what_is_not_json_is_wrong_as_a_whole() {
        for text in ["", " \n", "{", "name: x", "{\"list\": []} {}", "\u{0}"] {
            assert_eq!(wrong(text).path, "$", "{text}");
        }
        assert!(wrong("").reason.contains("empty"));
        assert!(wrong("name").reason.contains("not JSON"));
    }
}
